"""Rotations of the contraction axis of both operands.

They cancel in the product, and spread outliers over a block.

Everything here is float32 or wider: rotating in bfloat16 costs more than it saves.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

BLOCK = 128  # as in QuEST (arXiv 2502.05003)
# name -> whether random signs precede the Hadamard matrix (QuaRot, 2404.00456); None: no rotation.
ROTATIONS: dict[str, bool | None] = {"none": None, "hadamard": False, "randomized_hadamard": True}


@functools.cache
def block_size(width: int) -> int:
  """BLOCK, or else the largest power of two that divides `width`, with a warning in the log."""
  size = min(BLOCK, width & -width)
  if size < BLOCK:
    logging.warning(
      "width %d is not a multiple of %d: its Hadamard blocks are %d wide", width, BLOCK, size
    )
  return size


def rotate(x: jax.Array, rotation: str, axis: int) -> jax.Array:
  """x times an orthonormal matrix along `axis`, block by block; float32 or wider if it rotates."""
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
  # One product per block: a sum over a middle axis would transpose operand and result.
  blocks = x.reshape(*x.shape[:axis], -1, size, math.prod(x.shape[axis + 1 :]))
  return matmul(jnp.broadcast_to(matrix, (*blocks.shape[:-2], size, size)), blocks).reshape(x.shape)


# The matrix is its own transpose. Automatic differentiation would store a copy of it per block for
# the backward pass.
_multiply.defvjp(
  lambda x, axis: (_multiply(x, axis), None), lambda axis, nothing, g: (_multiply(g, axis),)
)


def _signs(x, axis):
  """Signs that all arrays of this width share, since both operands of a product must."""
  width = x.shape[axis]
  signs = 2 * np.random.RandomState(0).randint(0, 2, width) - 1  # legacy: its numbers never change
  return jnp.asarray(
    signs.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]), x.dtype
  )


@functools.cache
def hadamard(size: int) -> np.ndarray:
  """Sylvester's Hadamard matrix, scaled to be orthonormal; symmetric. size: a power of two."""
  matrix = np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix / size**0.5
