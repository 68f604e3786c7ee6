"""Text in: files and their formats, data sets of the hub, ids of others, the default corpus."""
