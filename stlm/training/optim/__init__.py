"""Optimizers, schedules, averages, and how far a run has come."""
