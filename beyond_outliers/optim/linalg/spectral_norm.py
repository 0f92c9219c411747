"""Estimates of the largest singular value of each matrix of a stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from beyond_outliers.ops.extremes import max_magnitude

HIGHEST = jax.lax.Precision.HIGHEST


def spectral_norm(x_BxMxN: jax.Array, steps: int = 12) -> jax.Array:
  """Lower bounds of the spectral norms, [B], by power iteration; a few per cent low when several
  singular values are close to the largest.

  2·steps + 1 products with a vector; 0 for a zero matrix."""
  # Any fixed start could be orthogonal to the vector sought; the row with the largest entry hardly
  # ever is.
  longest_B = jnp.argmax(max_magnitude(x_BxMxN, 2), 1)
  v_BxN = _unit(jnp.take_along_axis(x_BxMxN, longest_B[:, None, None], 1)[:, 0])[0]

  def image(v_BxN):
    return _unit(jnp.einsum("bmn,bn->bm", x_BxMxN, v_BxN, precision=HIGHEST))

  def advance(_, v_BxN):
    return _unit(jnp.einsum("bmn,bm->bn", x_BxMxN, image(v_BxN)[0], precision=HIGHEST))[0]

  return image(jax.lax.fori_loop(0, steps, advance, v_BxN))[1]


def _unit(v_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(each vector scaled to length one, its length [B]).

  Divides by the largest entry first: squares of small or large values leave float32's range."""
  largest_B = max_magnitude(v_BxN, 1)
  scaled = v_BxN / _or_one(largest_B)[:, None]
  length_B = jnp.linalg.norm(scaled, axis=1)
  return scaled / _or_one(length_B)[:, None], length_B * largest_B


def _or_one(x: jax.Array) -> jax.Array:
  """x with ones for zeros, so that a zero vector divided by it stays zero."""
  return jnp.where(x > 0, x, 1)
