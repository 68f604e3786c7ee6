"""Configs of patching rules, which decide where byte patches begin."""
