"""One small file: rounding, calibration, what it has cost."""
