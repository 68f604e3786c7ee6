"""Strict YAML to dataclasses: every value keeps its line, and all problems are in one report."""
