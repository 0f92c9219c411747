"""The language model: `Transformer` under one contract: tokens, logits, a plain stacked pytree."""

from beyond_outliers.model.transformer import Transformer

__all__ = ["Transformer"]
