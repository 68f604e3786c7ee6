"""Models as one small file: rounding, calibration, and the cost in bits per byte."""
