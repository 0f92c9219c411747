"""beyond_outliers: how the choice of optimizer changes what quantization costs a language model."""

__version__ = "0.1.0"
