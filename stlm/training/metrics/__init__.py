"""Metrics of a run: scalars, speed, utilization, energy."""
