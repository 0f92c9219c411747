"""Gradient estimators: masks of the gradient that passes through rounding.

Rounding's own derivative is zero almost everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from beyond_outliers.quant import grids

# Rounding can leave the largest value over its scale slightly beyond the largest level.
LEVEL_TOLERANCE = 2.0**-20


class Estimator(NamedTuple):
  """A mask of gradients.

  passes: (values in units of the scale, their grid) -> where the gradient passes; None: everywhere.
  learns_scale: whether the scale has a gradient, too."""

  passes: Callable[[jax.Array, grids.Grid], jax.Array] | None
  learns_scale: bool = False


def within_levels(v, grid):
  return (v >= grid.lowest * (1 + LEVEL_TOLERANCE)) & (v <= grid.largest * (1 + LEVEL_TOLERANCE))


def between_levels(v, grid):
  return (v > grid.lowest) & (v < grid.largest)


def trust_mask(v, grid):
  """QuEST's trust mask: values that quantization moves by at most half a step, that is all but
  those clipped by more.

  |x̂ - x| <= step/2 is written as a bound on x: computed from the difference, a tie would depend on
  float rounding."""
  return (v >= grid.lowest - grid.gap / 2) & (v <= grid.edge)


ESTIMATORS = {
  "ste": Estimator(None),  # arXiv 1308.3432
  "clip": Estimator(within_levels),
  "trust": Estimator(trust_mask),  # QuEST, arXiv 2502.05003, section 3.2
  "lsq": Estimator(between_levels, learns_scale=True),  # arXiv 1902.08153, equations 3 and 5
}
