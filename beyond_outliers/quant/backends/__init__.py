"""Backends, which multiply quantized operands: AQT's dot_general, or plain JAX."""
