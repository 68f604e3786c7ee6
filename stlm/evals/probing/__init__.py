"""Learning on top of a model: probes, fine-tuning, and their protocol."""
