"""Evaluation of checkpoints: as trained, and quantized by every method under every recipe."""
