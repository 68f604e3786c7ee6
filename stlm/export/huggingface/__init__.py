"""Folders of transformers, written and read."""
