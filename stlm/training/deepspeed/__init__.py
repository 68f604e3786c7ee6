"""DeepSpeed: the engine, its precision, its checkpoint formats."""
