"""Rotations of the contraction axis of both operands.

They cancel in the product, and spread outliers over a block.

Rotating in bfloat16 costs more than it spares; everything here is float32 or wider.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

BLOCK = 128  # as QuEST's (arXiv 2502.05003)
# name -> whether signs are drawn before the Hadamard matrix (QuaRot, 2404.00456); None: none.
ROTATIONS: dict[str, bool | None] = {"none": None, "hadamard": False, "randomized_hadamard": True}


@functools.cache
def block_size(width: int) -> int:
  """BLOCK, or the largest power of two below it that divides `width`; said in the log."""
  size = min(BLOCK, width & -width)
  if size < BLOCK:
    logging.warning(
      "width %d is not a multiple of %d: its Hadamard blocks are %d wide", width, BLOCK, size
    )
  return size


def rotate(x: jax.Array, rotation: str, axis: int) -> jax.Array:
  """x times an orthonormal matrix along `axis`, in blocks; float32 or wider."""
  signed = ROTATIONS[rotation]
  return x if signed is None else _blocks(x * _signs(x, axis) if signed else x, axis)


def unrotate(x: jax.Array, rotation: str, axis: int) -> jax.Array:
  """The inverse of `rotate`."""
  signed = ROTATIONS[rotation]
  if signed is None:
    return x
  x = _blocks(x, axis)  # a symmetric matrix is its own inverse if it is orthonormal
  return x * _signs(x, axis) if signed else x


def _blocks(x, axis):
  return _multiply(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis % x.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _multiply(x, axis):
  size = block_size(x.shape[axis])
  matrix = jnp.asarray(hadamard(size), x.dtype)
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  if axis == x.ndim - 1:
    return matmul(x.reshape(*x.shape[:axis], -1, size), matrix).reshape(x.shape)
  # One product per block: a sum over an axis in the middle would transpose operand and result.
  blocks = x.reshape(*x.shape[:axis], -1, size, math.prod(x.shape[axis + 1 :]))
  return matmul(jnp.broadcast_to(matrix, (*blocks.shape[:-2], size, size)), blocks).reshape(x.shape)


# The matrix is its own transpose. Automatic differentiation would keep one for the backward pass,
# and a copy of it a block.
_multiply.defvjp(
  lambda x, axis: (_multiply(x, axis), None), lambda axis, nothing, g: (_multiply(g, axis),)
)


def _signs(x, axis):
  """The same for every array of this width: both operands of a product must share them."""
  width = x.shape[axis]
  signs = 2 * np.random.RandomState(0).randint(0, 2, width) - 1  # legacy: its numbers never change
  return jnp.asarray(
    signs.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]), x.dtype
  )


@functools.cache
def hadamard(size: int) -> np.ndarray:
  """Sylvester's matrix, orthonormal and symmetric; size is a power of two."""
  matrix = np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix / size**0.5
