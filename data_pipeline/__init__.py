"""Text to documents, documents to memory-mapped shards of ids, shards to batches in a reproducible order.

The packages in order of use: `sources` yields documents, `cleaning` filters them, `tokenizers` turn text into ids,
`preparation` writes shards and a manifest (`storage`), and `loading` reads them as batches. `report` describes the
result. This package imports neither torch nor the models.
"""
