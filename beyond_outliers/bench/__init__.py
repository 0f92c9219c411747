"""Benches: what a step, an optimizer, a recipe, a method and a question cost on this machine, or on
paper."""
