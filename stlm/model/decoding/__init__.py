"""Decoding state: caches, and matrices in the form that decodes fastest."""
