"""A matrix for every axis of a block: the products that Shampoo and SOAP are made of, over stacks of blocks.

Legend: B blocks on this device, M and N axes of a block, D the axis that a matrix belongs to.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from beyond_outliers.optim import triangles

HIGHEST = jax.lax.Precision.HIGHEST


def gram(x: jax.Array, axis: int) -> jax.Array:
  """[B, D, D]: X Xᵀ over all axes of a block [B, M, N] or [B, N] but one."""
  if x.ndim == 2:
    return x[:, :, None] * x[:, None, :]
  with jax.default_matmul_precision("highest"):
    return jax.vmap(lambda y: triangles.symmetric(triangles.gram(y)))(x if axis == 0 else x.swapaxes(1, 2))


def along(axis: int, a_BxDxD: jax.Array, x: jax.Array, *, transposed: bool = False) -> jax.Array:
  """A X along one axis of the blocks, or Aᵀ X."""
  of_a = "kd" if transposed else "dk"
  of_x, result = {(0, 2): ("k", "d"), (0, 3): ("kn", "dn"), (1, 3): ("mk", "md")}[axis, x.ndim]
  return jnp.einsum(f"b{of_a},b{of_x}->b{result}", a_BxDxD, x, precision=HIGHEST)


def per_block(numbers_B: jax.Array, like: jax.Array) -> jax.Array:
  """[B] as an array that multiplies or chooses among blocks."""
  return numbers_B.reshape(-1, *(1,) * (like.ndim - 1))
