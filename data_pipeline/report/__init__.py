"""The page about a data folder, its plots, and the comparison of tokenizers."""
