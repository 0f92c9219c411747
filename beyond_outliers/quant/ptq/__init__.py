"""Quantization after training: `quantize` and the table of its METHODS."""

from beyond_outliers.quant.ptq.methods import METHODS, Method, method_named
from beyond_outliers.quant.ptq.model import (
  QuantizedModel,
  check,
  load,
  quantize,
  quantized,
  restored,
)

__all__ = [
  "METHODS",
  "Method",
  "QuantizedModel",
  "check",
  "load",
  "method_named",
  "quantize",
  "quantized",
  "restored",
]
