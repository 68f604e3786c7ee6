"""Several models on the same items: paired tests and plots."""
