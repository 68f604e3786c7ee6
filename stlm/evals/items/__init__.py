"""Items of tasks, from files and from the Hugging Face hub."""
