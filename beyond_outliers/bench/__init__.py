"""Benches: costs of steps, optimizers, recipes, quantization methods and scored questions, timed on
this machine or counted in compiled programs."""
