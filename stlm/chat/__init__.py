"""Chat templates, and conversations at a terminal."""
