"""Configs of embedders: ids to vectors."""
