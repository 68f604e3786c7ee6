"""Vectors to vectors: the transformer and its parts."""
