"""Configs of the core, vectors to vectors, and of the parts of a transformer."""
