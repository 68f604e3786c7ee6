"""Comparison of several models on the same items: paired tests and plots."""
