"""Vectors to logits."""
