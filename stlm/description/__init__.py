"""Descriptions of models and runs: cost, progress, and the text of a step."""
