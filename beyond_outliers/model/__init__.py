"""The language model: `Transformer` under one contract, tokens in, logits out, parameters a plain
stacked pytree."""

from beyond_outliers.model.transformer import Transformer

__all__ = ["Transformer"]
