"""Text to shards: read, clean, split, encode, write, with work shared and resumed."""
