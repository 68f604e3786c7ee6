"""The run directory: its lock, its config, its checkpoints."""
