"""The language model `Transformer`: tokens to logits, with parameters in a plain stacked pytree."""

from beyond_outliers.model.transformer import Transformer

__all__ = ["Transformer"]
