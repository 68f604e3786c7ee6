"""What a run records: scalars, speed, utilization, energy."""
