"""The sections that describe a model: one file for each family of components."""
