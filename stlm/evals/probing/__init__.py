"""What can be learned on top of a model: probes, fine-tuning, their protocol."""
