"""What travels with a model that transformers has no classes for: the classes, and in `files` all they are made of."""
