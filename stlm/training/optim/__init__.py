"""Optimizers, learning rate schedules, weight averaging, and the limits of a run."""
