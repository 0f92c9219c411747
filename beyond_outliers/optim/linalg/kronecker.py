"""Products of stacked blocks with one matrix per axis: the operations of Shampoo and SOAP.

Legend: B blocks on this device, M and N axes of a block, D the axis that a matrix belongs to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from beyond_outliers.ops.linalg import map_matrices

HIGHEST = jax.lax.Precision.HIGHEST
Scalar = jax.Array | float
HALVED_ROWS = 256  # from this many rows on, a symmetric product is faster in halves on CPU


def add_gram(
  factor_BxDxD: jax.Array, x: jax.Array, axis: int, decay: Scalar, weight: Scalar
) -> jax.Array:
  """decay · A + weight · X Xᵀ, [B, D, D]; X Xᵀ sums over all axes of a block but the given one.

  x: [B, M, N] or [B, N]."""
  if x.ndim == 2:
    return decay * factor_BxDxD + weight * x[:, :, None] * x[:, None, :]

  def add(a: jax.Array, x: jax.Array) -> jax.Array:
    return decay * a + weight * _times_transpose(x if axis == 0 else x.mT)

  return map_matrices(add, factor_BxDxD, x)


def along(axis: int, a_BxDxD: jax.Array, x: jax.Array, *, transposed: bool = False) -> jax.Array:
  """A X along one axis of the blocks; transposed: Aᵀ X."""
  if x.ndim == 2:
    return jnp.einsum("bkd,bk->bd" if transposed else "bdk,bk->bd", a_BxDxD, x, precision=HIGHEST)

  def product(a: jax.Array, x: jax.Array) -> jax.Array:
    a = a.mT if transposed else a
    pair = (a, x) if axis == 0 else (x, a.mT)
    return jnp.matmul(*pair, precision=HIGHEST)

  return map_matrices(product, a_BxDxD, x)


def broadcast_blocks(numbers_B: jax.Array, like: jax.Array) -> jax.Array:
  """numbers [B], reshaped to broadcast against blocks `like`."""
  return numbers_B.reshape(-1, *(1,) * (like.ndim - 1))


def _times_transpose(x: jax.Array) -> jax.Array:
  """X Xᵀ by quarters, one off-diagonal quarter being the other's transpose: 3/4 of the FLOPs."""
  d = x.shape[-2]
  if d < HALVED_ROWS:
    return _product(x, x)
  upper, lower = x[..., : d // 2, :], x[..., d // 2 :, :]
  corner = _product(lower, upper)
  return jnp.block([[_product(upper, upper), corner.mT], [corner, _product(lower, lower)]])


def _product(y: jax.Array, z: jax.Array) -> jax.Array:
  return jnp.matmul(y, z.mT, precision=HIGHEST)
