"""Grafting (arXiv 2002.11803): one method's direction with another method's step length.

Legend: B blocks in a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beyond_outliers.optim import blocks
from beyond_outliers.optim.blockwise import ByBucket
from beyond_outliers.optim.linalg.kronecker import Scalar, broadcast_blocks


class Graft(NamedTuple):
  """A row of GRAFTS."""

  direction: Callable[[jax.Array, Any, Scalar], jax.Array]  # (gradient, second moment, eps)
  has_second_moment: bool
  bias_correction: bool


def _sgd(g: jax.Array, second_moment: Any, eps: Scalar) -> jax.Array:
  del second_moment, eps
  return g


def _over_root(g: jax.Array, second_moment: jax.Array, eps: Scalar) -> jax.Array:
  return g / (jnp.sqrt(second_moment) + eps)


GRAFTS: dict[str, Graft | None] = {
  "none": None,
  "sgd": Graft(_sgd, False, False),
  "adam": Graft(_over_root, True, True),
  "rmsprop": Graft(_over_root, True, False),
}


def squared_lengths(step: jax.Array, direction: jax.Array, counts_B: jax.Array) -> jax.Array:
  """Squared lengths, [B, 2], of the grafting method's step and of the direction; 0 for blocks that
  `counts_B` excludes."""
  both = [jnp.sum(x * x, tuple(range(1, x.ndim))) for x in (step, direction)]
  return counts_B[:, None] * jnp.stack(both, 1)


def give_lengths(
  layout: blocks.Layout, granularity: str, directions: ByBucket, squares: ByBucket, counts: ByBucket
) -> ByBucket:
  """Directions rescaled to the grafting method's step length, where `counts` [B] is true.

  squares [B, 2]: see `squared_lengths`. granularity "parameter": a length is that of all blocks of
    a slice together."""
  if granularity == "parameter":
    squares = layout.sum_over_slices(squares)
  given = {}
  for name, direction in directions.items():
    lengths = jnp.sqrt(squares[name])
    scale_B = jnp.where(counts[name], lengths[:, 0] / (lengths[:, 1] + 1e-16), 1)
    given[name] = direction * broadcast_blocks(scale_B, direction)
  return given
