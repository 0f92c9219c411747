"""The mathematics of quantization, as pure functions: values to codes and back, and gradients.

Legend: x any array; `axis` its contraction axis, along which values share a scale and are rotated.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beyond_outliers.config.checks import require
from beyond_outliers.ops import random
from beyond_outliers.quant import rotations
from beyond_outliers.quant.estimators import ESTIMATORS
from beyond_outliers.quant.scales import (
  GRANULARITIES,
  SCALES,
  absmax,
  has_ties,
  quotient,
  reciprocal,
)
from beyond_outliers.quant.spec import QuantSpec


class Quantized(NamedTuple):
  """Values as codes · scale.

  Along each axis the scale has length one (shared by all), that of the codes, or one entry per
  block of equal length."""

  codes: jax.Array
  scale: jax.Array


class Saved(NamedTuple):
  """What a forward pass saves for its backward pass."""

  passes: jax.Array | None  # where the gradient passes; None: everywhere
  slope: jax.Array | None  # d x̂ / d scale, for a learned scale


def scale_of(x: jax.Array, spec: QuantSpec, axis: int) -> jax.Array:
  """The scales of `x`: float32 or wider; along `axis` of length one, or one per block. NaN where a
  value is not finite, or where the scale is too large to divide by, since codes would hide that.

  Errors: ConfigError when a group does not divide the axis."""
  x, axis = x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis % x.ndim
  granularity = GRANULARITIES[spec.granularity]
  rule = (granularity.rule or SCALES[spec.scale]) if x.size else absmax  # zero if x is empty
  block = block_of(spec, x.shape[axis])
  if granularity.all:
    scale = rule(x, tuple(range(x.ndim)), spec.levels)
  elif block is None:
    scale = rule(x, (axis,), spec.levels)
  else:
    blocks = x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    scale = jnp.squeeze(rule(blocks, (axis + 1,), spec.levels), axis + 1)
  return jnp.where(scale <= 1 / jnp.finfo(scale.dtype).tiny, scale, jnp.nan)


def block_of(spec: QuantSpec, width: int) -> int | None:
  """The number of values that share a scale along an axis of this width; None: all of them.

  Errors: ConfigError when it does not divide the width."""
  block = GRANULARITIES[spec.granularity].block
  if block is None:
    return None
  require(
    width % (block or spec.group) == 0,
    "group" if block == 0 else "granularity",
    spec.group or spec.granularity,
    f"blocks of {block or spec.group} do not divide a width of {width}",
  )
  return block or spec.group


def spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Scales, repeated over their blocks so that they broadcast against an array of this shape."""
  for axis, (count, width) in enumerate(zip(scale.shape, shape, strict=True)):
    if 1 < count < width:
      scale = jnp.repeat(scale, width // count, axis)
  return scale


def in_units(x: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
  """Values in units of their scale."""
  if divides(spec):
    return quotient(x.astype(scale.dtype), spread(scale, x.shape))
  # Multiplied by the reciprocal: cheaper than a division, and what AQT does.
  return x.astype(scale.dtype) * spread(reciprocal(scale), x.shape)


def divides(spec: QuantSpec) -> bool:
  """Whether values are divided by their scale rather than multiplied by its reciprocal: necessary
  where the largest may lie halfway between two codes, so that its last bit decides
  (scales.absmax_edge)."""
  return spec.scale == "absmax_edge" and has_ties(spec.levels)


def forward(
  x: jax.Array, scale: jax.Array, spec: QuantSpec, key: jax.Array | None = None
) -> tuple[Quantized, Saved]:
  """Quantizes values, which must be rotated already."""
  codes, saved = encode(in_units(x, scale, spec), spec, key)
  return Quantized(codes, _telling(scale, x) if spec.scale == "learned" else scale), saved


def _telling(scale: jax.Array, x: jax.Array) -> jax.Array:
  """A scale not computed from `x`, but NaN if `x` is not finite, which codes would hide."""
  return jnp.where(jnp.isfinite(x).all(), scale, jnp.nan)


def encode(v: jax.Array, spec: QuantSpec, key: jax.Array | None) -> tuple[jax.Array, Saved]:
  """Codes of values `v`, which are in units of their scale; rounded to nearest if `key` is None."""
  if spec.rounding == "stochastic" and key is not None:
    to_integer = functools.partial(_round_stochastically, key)
  else:
    to_integer = jnp.round
  codes, estimator = spec.levels.round(v, to_integer), ESTIMATORS[spec.estimator]
  passes = estimator.passes(v, spec.levels) if estimator.passes else None
  slope = codes - jnp.where(passes, v, 0) if passes is not None and estimator.learns_scale else None
  return codes.astype(spec.levels.dtype), Saved(passes, slope)


def _round_stochastically(key: jax.Array, v: jax.Array) -> jax.Array:
  return jnp.floor(v + random.uniform(key, v.shape, v.dtype))


def backward(saved: Saved, g: jax.Array) -> jax.Array:
  """The gradient of values, given that of the quantized values."""
  return g if saved.passes is None else jnp.where(saved.passes, g, 0)


def scale_gradient(saved: Saved, g: jax.Array, spec: QuantSpec, count: int) -> jax.Array | None:
  """The gradient of a learned scale, times 1 / sqrt(count · largest level); None for a scale that
  follows a rule.

  arXiv 1902.08153, section 2.2.

  count: the number of weights, or of features of activations, however many tokens there are."""
  if saved.slope is None:
    return None
  return (jnp.sum(g * saved.slope) / (count * spec.levels.largest) ** 0.5).reshape((1,) * g.ndim)


def quantize_array(
  x: jax.Array,
  spec: QuantSpec,
  axis: int = -1,
  *,
  key: jax.Array | None = None,
  scale: jax.Array | None = None,
) -> Quantized:
  """Codes and scales of `x`, rotated if the spec rotates.

  Not differentiable: see `fake_quantize`."""
  x = rotations.rotate(x, spec.rotation, axis)
  scale = scale_of(x, spec, axis) if scale is None else _telling(scale, x)
  return forward(x, scale, spec, key)[0]


def dequantize(q: Quantized) -> jax.Array:
  """codes · scale, in the basis that was quantized."""
  return q.codes.astype(q.scale.dtype) * spread(q.scale, q.codes.shape)


def fake_quantize(
  x: jax.Array,
  spec: QuantSpec,
  axis: int = -1,
  *,
  key: jax.Array | None = None,
  scale: jax.Array | None = None,
) -> jax.Array:
  """`x` quantized and dequantized, in its own basis and type; its gradient is the spec's estimator.

  scale: replaces the scale that the spec's rule would find; a learned one gets a gradient, as for
    weights."""
  rotated = rotations.rotate(x, spec.rotation, axis)
  if scale is None:
    scale = jax.lax.stop_gradient(scale_of(rotated, spec, axis))
  else:
    scale = _telling(scale, rotated)
  return rotations.unrotate(_fake(spec, rotated, scale, key), spec.rotation, axis).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake(spec, x, scale, key):
  return dequantize(forward(x, scale, spec, key)[0])


def _fake_forward(spec, x, scale, key):
  q, saved = forward(x, scale, spec, key)
  # Residuals have to be arrays: the empty one carries the type of x.
  return dequantize(q), (saved, jnp.zeros((0,), x.dtype))


def _fake_backward(spec, residuals, g) -> tuple[Any, ...]:
  saved, kind = residuals
  return backward(saved, g).astype(kind.dtype), scale_gradient(saved, g, spec, g.size), None


_fake.defvjp(_fake_forward, _fake_backward)
