"""Moments in the eigenbases of a block's factors: what SOAP and eigenvalue-corrected Shampoo share.

Legend: B blocks on this device, M and N axes of a block, D the axis of a basis, A rotated axes of a
block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.optim.blocks import Bucket
from beyond_outliers.optim.linalg.kronecker import Scalar, add_gram, along, broadcast_blocks

Arrays = tuple[jax.Array, ...]


class BlocksState(NamedTuple):
  """State of a bucket of blocks; the stack axis comes first in every array."""

  momentum: jax.Array  # [B, *block] average of gradients, expressed in the bases
  second_moment: jax.Array  # [B, *block] average of the squares of gradients in the bases
  factors: Arrays  # one per rotated axis, [B, D, D]: averages of G Gᵀ
  bases: Arrays  # one per rotated axis, [B, D, D]: eigenvectors as columns; at first the identity
  age: Any  # [B, A] steps since the basis in use was computed; -1: never; () without bases
  kept: Any  # [B, A] new bases refused so far, because not finite; () without bases


def first_state(bucket: Bucket, axes: tuple[int, ...], dtype: np.dtype) -> BlocksState:
  """Initial state of a bucket whose axes `axes` are to be rotated."""

  def numbers(value: int) -> Any:
    # Orbax cannot save empty arrays, so without rotated axes there is no array.
    return jnp.full((bucket.padded, len(axes)), value, jnp.int32) if axes else ()

  lengths = [bucket.shape[axis] for axis in axes]
  return BlocksState(
    bucket.zeros(*bucket.shape, dtype=dtype),
    bucket.zeros(*bucket.shape, dtype=dtype),
    tuple(bucket.zeros(d, d, dtype=dtype) for d in lengths),
    tuple(bucket.identity(d, dtype) for d in lengths),
    numbers(-1),
    numbers(0),
  )


def accumulate_factors(
  factors: Arrays, g: jax.Array, axes: tuple[int, ...], decay: Scalar, weight: Scalar
) -> Arrays:
  """decay · factor + weight · G Gᵀ, for each of the axes."""
  return tuple(
    add_gram(factor, g, axis, decay, weight) for factor, axis in zip(factors, axes, strict=True)
  )


def grown_older(s: BlocksState) -> BlocksState:
  """The state, its bases one step older."""
  return s._replace(age=jnp.where(s.age < 0, -1, s.age + 1))


def change_bases(
  s: BlocksState, bases: Arrays, axes: tuple[int, ...]
) -> tuple[BlocksState, jax.Array]:
  """(the state with its bases [B, D, D] replaced where the new ones are finite, and its first
  moment rotated into them; whether each was, [B, A])."""
  ok_BxA = jnp.stack([jnp.isfinite(basis).all((1, 2)) for basis in bases], 1)
  chosen = tuple(
    jnp.where(broadcast_blocks(ok_B, new), new, old)
    for ok_B, new, old in zip(ok_BxA.T, bases, s.bases, strict=True)
  )
  momentum = rotate_block(rotate_block(s.momentum, s.bases, axes, back=True), chosen, axes)
  age, kept = jnp.where(ok_BxA, 0, s.age), s.kept + ~ok_BxA
  return s._replace(momentum=momentum, bases=chosen, age=age, kept=kept), ok_BxA


def rotate_block(
  x: jax.Array, bases: Arrays, axes: tuple[int, ...], *, back: bool = False
) -> jax.Array:
  """[B, *block] with these axes of the blocks rotated into their bases [B, D, D], or back out."""
  for basis, axis in zip(bases, axes, strict=True):
    x = along(axis, basis, x, transposed=not back)
  return x
