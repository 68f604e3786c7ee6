"""Text in: files and their formats, data sets of the hub, files of ids, the default corpus."""
