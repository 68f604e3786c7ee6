"""Sections of a model's config, one file for each family of components."""
