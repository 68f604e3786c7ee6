"""Items of tasks, from files and from the hub."""
