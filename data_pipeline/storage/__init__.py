"""Files on disk: atomic writing, shards, the manifest."""
