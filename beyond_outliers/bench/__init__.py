"""Benches: the cost of a step, an optimizer, a recipe, a quantization method and a scored question,
timed on this machine or counted in compiled programs."""
