"""Conversion to GGUF files for llama.cpp, checked by running them in llama.cpp."""
