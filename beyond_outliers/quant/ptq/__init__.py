"""Post-training quantization (PTQ): `quantize` and the table of its METHODS."""

from beyond_outliers.quant.ptq.conversion import check_quantizable, quantize, quantized
from beyond_outliers.quant.ptq.fallback import Fallback
from beyond_outliers.quant.ptq.methods import METHODS, Method, method_named
from beyond_outliers.quant.ptq.model import QuantizedModel, load, restored

__all__ = [
  "METHODS",
  "Fallback",
  "Method",
  "QuantizedModel",
  "check_quantizable",
  "load",
  "method_named",
  "quantize",
  "quantized",
  "restored",
]
