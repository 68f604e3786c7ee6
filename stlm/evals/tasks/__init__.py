"""Tasks, one file for each kind."""
