"""Maxima and minima that are NaN where a number is.

XLA's CPU backend (jaxlib 0.10.2) passes over a NaN among 4096 and more float32 numbers
(findings/xla_cpu_max_skips_nan.sh). So guards, scales and metrics ask here; `jnp.max` is left to
what integers hold, and to softmaxes, whose sum sees the NaN. Of other numbers the result is the
same bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Axis = int | tuple[int, ...] | None


def max_magnitude(x: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
  """max |x| of floats; 0 where there are none.

  By their bits as integers, whose order is that of magnitudes, with NaN above all: one sweep, and
  on a mesh one all-reduce."""
  x = jnp.abs(x)
  bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
  return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims, initial=0), x.dtype)


def max_or_nan(x: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
  """The largest number, or NaN where there is one."""
  return _or_nan(jnp.max, x, axis, keepdims)


def min_or_nan(x: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
  """The smallest number, or NaN where there is one."""
  return _or_nan(jnp.min, x, axis, keepdims)


def _or_nan(extreme: Any, x: jax.Array, axis: Axis, keepdims: bool) -> jax.Array:
  found = extreme(x, axis=axis, keepdims=keepdims)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return found
  return jnp.where(jnp.isnan(x).any(axis=axis, keepdims=keepdims), jnp.nan, found)
