"""Strict YAML to dataclasses: every value knows its line, all problems at once."""
