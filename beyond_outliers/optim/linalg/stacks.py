"""Stacks of matrices: products in full precision, and one scalar per matrix.

Shapes: B matrices in a stack, d their width. Matrices of a stack never influence each other.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from beyond_outliers.ops.extremes import max_magnitude

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def each(x_B: jax.Array) -> jax.Array:
  """Scalars [B], reshaped to multiply a stack of matrices."""
  return x_B[:, None, None]


def largest(x: jax.Array) -> jax.Array:
  """The largest magnitude, [B], but never zero, so that it can divide."""
  return jnp.maximum(max_magnitude(x, tuple(range(1, x.ndim))), jnp.finfo(x.dtype).tiny)


def frobenius_norm(x_BxDxD: jax.Array) -> jax.Array:
  """Frobenius norms, [B], scaled so that squares of small entries don't underflow."""
  scale_B = largest(x_BxDxD)
  return scale_B * jnp.linalg.norm(x_BxDxD / each(scale_B), axis=(-2, -1))


def largest_eigenvalue(a_BxDxD: jax.Array, max_steps: int = 100) -> jax.Array:
  """Largest eigenvalues, [B], from below by power iteration, up to a relative change of 1e-6."""
  scale_B = largest(a_BxDxD)

  def unit(v_BxD):
    return v_BxD / jnp.maximum(
      jnp.linalg.norm(v_BxD, axis=-1, keepdims=True), jnp.finfo(v_BxD.dtype).tiny
    )

  def advance(carry):
    step, v_BxD, old_B, active_B = carry
    image_BxD = einsum("bij,bj->bi", a_BxDxD, v_BxD) / scale_B[:, None]
    new_B = jnp.where(active_B, jnp.sum(v_BxD * image_BxD, axis=-1), old_B)
    return (
      step + 1,
      unit(image_BxD),
      new_B,
      active_B & (jnp.abs(new_B - old_B) > 1e-6 * jnp.abs(new_B)),
    )

  start = (
    0,
    jnp.broadcast_to(unit(probe(a_BxDxD)), a_BxDxD.shape[:-1]),
    jnp.zeros_like(scale_B),
    jnp.full(scale_B.shape, True),
  )
  _, _, eigenvalue_B, _ = lax.while_loop(
    lambda carry: (carry[0] < max_steps) & jnp.any(carry[3]), advance, start
  )
  return scale_B * jnp.abs(eigenvalue_B)


def probe(a_BxDxD: jax.Array) -> jax.Array:
  """The same normal random vector z [d] at every call: |E z| estimates the Frobenius norm of any E
  that is independent of z."""
  return jnp.asarray(np.random.default_rng(0).standard_normal(a_BxDxD.shape[-1]), a_BxDxD.dtype)
