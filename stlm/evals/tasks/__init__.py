"""What a model is asked, one file for each kind of task."""
