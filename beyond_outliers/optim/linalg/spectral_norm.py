"""The largest singular value of each matrix of a stack, estimated."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def spectral_norm(x_BxMxN: jax.Array, steps: int = 12) -> jax.Array:
  """[B]: a lower bound, by power iteration from a long row; a few per cent low when singular values
  crowd at the top.

  2·steps + 1 products with a vector; 0 for a zero matrix."""
  # Any fixed start could be orthogonal to what is sought; a long row hardly is.
  longest_B = jnp.argmax(jnp.max(jnp.abs(x_BxMxN), 2), 1)
  v_BxN = _unit(jnp.take_along_axis(x_BxMxN, longest_B[:, None, None], 1)[:, 0])[0]
  forward = lambda v: jnp.einsum("bmn,bn->bm", x_BxMxN, v, precision=jax.lax.Precision.HIGHEST)
  back = lambda u: jnp.einsum("bmn,bm->bn", x_BxMxN, u, precision=jax.lax.Precision.HIGHEST)
  v_BxN = jax.lax.fori_loop(0, steps, lambda _, v: _unit(back(_unit(forward(v))[0]))[0], v_BxN)
  return _unit(forward(v_BxN))[1]


def _unit(v_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(each vector at length one, length [B]); by way of its largest entry: squares of small or large
  numbers leave float32."""
  or_one = lambda x: jnp.where(x > 0, x, 1)  # zero stays zero
  largest_B = jnp.max(jnp.abs(v_BxN), 1)
  scaled = v_BxN / or_one(largest_B)[:, None]
  length_B = jnp.linalg.norm(scaled, axis=1)
  return scaled / or_one(length_B)[:, None], length_B * largest_B
