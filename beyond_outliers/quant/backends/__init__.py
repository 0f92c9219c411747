"""Backends that multiply quantized operands: AQT's dot_general, and plain JAX."""
