"""Files for llama.cpp, and llama.cpp at work on them."""
