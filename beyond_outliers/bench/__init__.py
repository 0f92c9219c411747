"""Benches: the cost of a step, an optimizer, a recipe, a method and a question, timed on this
machine or counted in programs."""
