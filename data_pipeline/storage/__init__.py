"""What is on disk: files that appear whole, shards, the manifest."""
