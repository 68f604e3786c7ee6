"""Code that is exported with a model for which transformers has no class: the classes, and in `files` their source."""
