"""Maxima and minima that are NaN if any number is.

XLA's CPU backend (jaxlib 0.10.2) skips a NaN among 4096 or more float32 numbers
(findings/xla_cpu_max_skips_nan.sh). Guards, scales and metrics therefore use this module; `jnp.max`
is used only for integers, and in softmaxes, whose sum shows the NaN. Without a NaN the results have
the same bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Axis = int | tuple[int, ...] | None


def max_magnitude(x: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
  """max |x| of floats; 0 if there are none.

  Compares their bits as integers, which are ordered like the magnitudes, with NaN above all: one
  sweep, and on a mesh one all-reduce."""
  x = jnp.abs(x)
  bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
  return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims, initial=0), x.dtype)


def max_or_nan(x: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
  """The largest number, or NaN if there is one."""
  return _or_nan(jnp.max, x, axis, keepdims)


def min_or_nan(x: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
  """The smallest number, or NaN if there is one."""
  return _or_nan(jnp.min, x, axis, keepdims)


def _or_nan(extreme: Any, x: jax.Array, axis: Axis, keepdims: bool) -> jax.Array:
  found = extreme(x, axis=axis, keepdims=keepdims)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return found
  return jnp.where(jnp.isnan(x).any(axis=axis, keepdims=keepdims), jnp.nan, found)
