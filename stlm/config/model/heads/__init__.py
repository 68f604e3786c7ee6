"""Configs of heads: vectors to logits."""
