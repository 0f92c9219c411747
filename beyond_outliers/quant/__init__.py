"""Quantization: specs as data, their mathematics, and the quantized products of linear layers."""

from beyond_outliers.quant import metrics
from beyond_outliers.quant.dot import BACKENDS, dot_general_for
from beyond_outliers.quant.ptq import METHODS, QuantizedModel, load, quantized
from beyond_outliers.quant.quantizers import Quantized, dequantize, fake_quantize, quantize_array
from beyond_outliers.quant.recipes import RECIPES, LinearShape, Recipe
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec

__all__ = [
  "BACKENDS",
  "METHODS",
  "RECIPES",
  "LayerRecipe",
  "LinearShape",
  "QuantSpec",
  "Quantized",
  "QuantizedModel",
  "Recipe",
  "dequantize",
  "dot_general_for",
  "fake_quantize",
  "load",
  "metrics",
  "quantize_array",
  "quantized",
]
