"""Rules that decide where byte patches begin."""
