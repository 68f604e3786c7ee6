"""Text to documents, documents to memory-mapped shards of ids, shards to batches in a reproducible order.

The road, one file per step: `sources` (and `corpus`, the default text) → `prepare` → `shards` and `manifest` on disk →
`reader`, which asks `order` where the next window lies. `tokenizers` turn text into ids. This package knows neither
torch nor the models.
"""
