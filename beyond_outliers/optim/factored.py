"""Layout, factored axes, first refresh and bias correction of both variants of Shampoo.

A factored axis has a factor G Gᵀ. The variants: with roots, and eigenvalue-corrected."""

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
  """Axes with a factor, of a block of this shape: those of at most block_size."""
  return tuple(axis for axis, length in enumerate(shape) if length <= h.block_size)


def first_refresh(h: Shampoo) -> int:
  """The first step with roots or bases: start_step, by default precondition_frequency."""
  return h.precondition_frequency if h.start_step is None else h.start_step


def bias_correction(h: Shampoo, decay: Scalar, t: jax.Array) -> jax.Array | int:
  """What an average from zero over t steps is divided by; 1 for a sum, whose decay is 1."""
  return jnp.where(decay < 1, 1 - decay**t, 1) if h.bias_correction else 1
