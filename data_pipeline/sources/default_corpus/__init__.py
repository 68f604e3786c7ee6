"""The text that needs no download: prose of Python and its packages, and questions about it."""
