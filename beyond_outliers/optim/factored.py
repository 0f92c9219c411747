"""Layout, factored axes and first refresh of Shampoo and its eigenvalue-corrected variant.

A factored axis has a factor G Gᵀ."""

from __future__ import annotations

from typing import Any

import jax

from beyond_outliers.config.optimizers import Shampoo
from beyond_outliers.optim import blocks
from beyond_outliers.optim.axes import AxesTree


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
