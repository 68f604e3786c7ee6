"""Ranks: who they are, what they exchange, signals, hangs, time."""
