"""Scales (the value of a code of one): the rules that find them, and granularities, which say what
values share one.

A rule takes an array, the axes that share a scale, and the grid. It returns scales, in float32 or
wider, with those axes kept at length one: positive; zero or tiny where all values are zero; not
finite where some value is not, since codes would hide that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops.extremes import max_magnitude
from beyond_outliers.quant import grids

Rule = Callable[[jax.Array, tuple[int, ...], grids.Grid], jax.Array]

# Number of levels -> the largest level, in standard deviations, of the grid with the least squared
# error on a normal distribution: the constants of QuEST (arXiv 2502.05003). The last three are
# slightly below their optima.
GAUSSIAN_BOUND = {
  2: 0.7978845587140913,
  3: 1.2240089519030855,
  4: 1.4935346200015913,
  8: 2.051068354131873,
  16: 2.513930578568423,
  32: 2.9160938834961225,
  64: 3.276597282593217,
  128: 3.6010497188221655,
  256: 3.884938678807525,
}
# Shares of the largest magnitude at which the search for a clip tries to cut: from 1 down to 0.2.
CLIP_RATIOS = [i / 100 for i in range(100, 19, -1)]


def _largest(x, axes):
  return max_magnitude(x, axes, keepdims=True)


def absmax(x, axes, grid):
  """The largest magnitude falls on the largest level: absmax/7 at four symmetric bits."""
  return _largest(x, axes) / grid.largest


def absmax_edge(x, axes, grid):
  """The largest magnitude falls on the end of the largest level's rounding interval: absmax/7.5 at
  four symmetric bits.

  In two's complement, if the largest number is negative, it is then halfway between two codes, and
  the last bit decides: there quotients are rounded only once, as in compressed-tensors."""
  largest = _largest(x, axes)
  return quotient(largest, grid.edge) if has_ties(grid) else largest / grid.edge


def has_ties(grid):
  """Whether the edge's negative lies between two codes, as in two's complement."""
  return -grid.lowest > grid.largest


def gaussian(x, axes, grid):
  """The scale of least squared error for normal values with mean zero (arXiv 2502.05003)."""
  rms = jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
  return (GAUSSIAN_BOUND[grid.count] * rms + 1e-8) / grid.largest


def percentile(percent, x, axes, grid):
  """`percent` of the magnitudes stay within the largest level; all, if that many are zero."""
  largest = _largest(x, axes)
  bound = jnp.quantile(jnp.abs(x), percent / 100, axis=axes, keepdims=True)
  bound = jnp.where(bound > 0, bound, largest)
  # Without this, an infinite number above the bound would just be clipped.
  return jnp.where(jnp.isfinite(largest), bound, jnp.nan) / grid.largest


def mse(x, axes, grid):
  """absmax times that one of CLIP_RATIOS with the least squared error; of equals, the largest."""
  whole = absmax(x, axes, grid)

  def attempt(best, ratio):
    least, scale = best
    candidate = whole * ratio
    error = jnp.sum(
      (grid.round(x * reciprocal(candidate), jnp.round) * candidate - x) ** 2,
      axis=axes,
      keepdims=True,
    )
    better = error < least
    return (jnp.where(better, error, least), jnp.where(better, candidate, scale)), None

  start = jnp.full_like(whole, jnp.inf), whole
  return lax.scan(attempt, start, jnp.asarray(CLIP_RATIOS, x.dtype))[0][1]


def learned(x, axes, grid):
  """Initial learned scale: 2 mean|x| / sqrt(largest level) (arXiv 1902.08153, section 2.1)."""
  return 2 * jnp.mean(jnp.abs(x), axis=axes, keepdims=True) / grid.largest**0.5


def shared_exponent(x, axes, grid):
  """absmax over the largest level, both rounded down to powers of two.

  OCP Microscaling Formats 1.0, section 6.3."""
  largest = _largest(x, axes)
  exponent = jnp.frexp(largest)[1] - 1 - grid.largest_exponent
  # The exponents of e8m0 start at -127, where float32 has no normal numbers; e8m0 has a NaN.
  scale = jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent, -126, 127)).astype(x.dtype)
  return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def two_level(x, axes, grid):
  """absmax in e4m3, times one float32 for all, chosen so that the largest of these is e4m3's
  largest number (arXiv 2509.25149, appendix C)."""
  return _two_level(x, axes, None, grid)


def two_level_a_row(x, axes, grid):
  """two_level with one float32 per row of blocks, which follow one another on the axis before
  `axes`."""
  (axis,) = axes
  return _two_level(x, axes, (axis - 1, axis), grid)


def _two_level(x, axes, outer, grid):
  e4m3 = grids.GRIDS["e4m3"][8]
  whole = _largest(x, outer) / (grid.largest * e4m3.largest)
  return e4m3.round(absmax(x, axes, grid) * reciprocal(whole), jnp.round) * whole


def reciprocal(scale):
  """1 / scale, or zero if the scale is zero or tiny: then there is nothing to scale."""
  return jnp.where(scale > jnp.finfo(scale.dtype).tiny, 1 / scale, 0)


def quotient(x, divisor):
  """x / divisor, rounded once; zero where x is.

  XLA replaces division by a constant, or by a divisor that is broadcast, by multiplication with the
  reciprocal, which rounds twice (findings/xla_divides_by_reciprocal.sh). The divisor here has a
  value for every x, so XLA divides."""
  return x / jnp.where(x == 0, 1, divisor)


SCALES: dict[str, Rule] = {
  "absmax": absmax,
  "absmax_edge": absmax_edge,
  "mse": mse,
  "gaussian": gaussian,
  "percentile_99": functools.partial(percentile, 99),
  "percentile_99.9": functools.partial(percentile, 99.9),
  "percentile_99.99": functools.partial(percentile, 99.99),
  "learned": learned,
}


class Granularity(NamedTuple):
  """The values that share a scale: all, those along the contraction axis, or a block of these.

  block: the number of consecutive values along the contraction axis; 0: the spec's `group`.
  rule: the format's rule, which replaces the spec's."""

  all: bool = False
  block: int | None = None
  rule: Rule | None = None


# With "tensor" and "nv", a token's codes depend on all other tokens of the batch, including later
# ones and those of other windows. That does not concern weights, nor lsq's learned scales; no other
# named recipe uses them for activations or gradients.
GRANULARITIES = {
  "tensor": Granularity(all=True),
  "channel": Granularity(),  # weights: one scale per output channel
  "token": Granularity(),  # activations, and gradients: one scale per token
  "group": Granularity(block=0),
  "mx": Granularity(block=32, rule=shared_exponent),
  "nv": Granularity(block=16, rule=two_level),
  "nv_token": Granularity(block=16, rule=two_level_a_row),
}
