"""Shards to batches: windows, their order, mixtures of folders."""
