"""Evaluation of checkpoints: as they were trained, and quantized after training by every method
under every recipe."""
