"""What multiplies quantized operands: AQT's dot_general, or plain JAX."""
