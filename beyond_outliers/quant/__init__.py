"""Quantization: specs as data, their mathematics, and what a model's linear layers multiply with."""
from beyond_outliers.quant.quantizers import Quantized, dequantize, fake_quantize, quantize
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec

__all__ = ["LayerRecipe", "QuantSpec", "Quantized", "dequantize", "fake_quantize", "quantize"]
