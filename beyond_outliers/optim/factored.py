"""Layout, factored axes, first refresh and bias correction: what both variants of Shampoo, with
roots and eigenvalue-corrected, share.

A factored axis is one with a factor G Gᵀ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from beyond_outliers.config.optimizers import Shampoo
from beyond_outliers.optim import blocks
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.linalg.kronecker import Scalar


def layout(tree: Any, h: Shampoo, axes: AxesTree, mesh: jax.sharding.Mesh | None) -> blocks.Layout:
  return blocks.layout(
    tree,
    axes,
    mesh=mesh,
    block_size=h.block_size if h.long_axes == "block" else None,
    merge_up_to=h.block_size if h.merge_dims else 0,
  )


def factored_axes(h: Shampoo, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Axes of a block of this shape that have a factor: those no longer than block_size."""
  return tuple(axis for axis, length in enumerate(shape) if length <= h.block_size)


def first_refresh(h: Shampoo) -> int:
  """The first step with roots or bases: start_step, by default precondition_frequency."""
  return h.precondition_frequency if h.start_step is None else h.start_step


def bias_correction(h: Shampoo, decay: Scalar, t: jax.Array) -> jax.Array | int:
  """Divisor that removes the bias of an average that started at zero t steps ago; 1 for a sum
  (decay 1)."""
  return jnp.where(decay < 1, 1 - decay**t, 1) if h.bias_correction else 1
