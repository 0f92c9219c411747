"""Symmetric matrices in half the memory: one triangle and the diagonal, packed into a rectangle."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def pack(a_BxDxD: jax.Array) -> jax.Array:
  """[B, D, D] symmetric -> [B, 2h + 1, h], h = ceil(D / 2): D(D + 1)/2 elements for even D.

  Rows 0…h hold the upper triangle of the first diagonal block and, below its diagonal, the lower
  triangle of the second one, moved down by a row; the other rows are the off-diagonal block.
  (LAPACK's rectangular full packed format, transposed.)"""
  h = -(-a_BxDxD.shape[-1] // 2)
  grow = 2 * h - a_BxDxD.shape[-1]
  a = jnp.pad(a_BxDxD, ((0, 0), (0, grow), (0, grow)))
  first = jnp.pad(a[:, :h, :h], ((0, 0), (0, 1), (0, 0)))
  second = jnp.pad(a[:, h:, h:], ((0, 0), (1, 0), (0, 0)))
  return jnp.concatenate([jnp.where(_upper(h), first, second), a[:, :h, h:]], axis=1)


def unpack(packed: jax.Array, d: int) -> jax.Array:
  """The inverse of `pack`."""
  h = -(-d // 2)
  triangles, between = packed[:, : h + 1], packed[:, h + 1 :]
  first = jnp.where(_upper(h)[:-1], triangles[:, :-1], 0)
  second = jnp.where(_upper(h)[1:], 0, triangles[:, 1:])
  first, second = _mirror(first), _mirror(second)
  top = jnp.concatenate([first, between], axis=2)
  bottom = jnp.concatenate([between.swapaxes(1, 2), second], axis=2)
  return jnp.concatenate([top, bottom], axis=1)[:, :d, :d]


def stored_dtype(preconditioner_dtype: str, dtype: Any) -> Any:
  """The dtype that a preconditioner_dtype of "bfloat16" or "float32" stands for, in a state of this
  dtype: the latter is float64 where the mathematics is checked in that."""
  return jnp.bfloat16 if preconditioner_dtype == "bfloat16" else dtype


def to_storage(a_BxDxD: jax.Array, dtype: Any, packed: bool) -> jax.Array:
  """Matrices [B, D, D] in the form in which they are kept between steps."""
  return (pack(a_BxDxD) if packed else a_BxDxD).astype(dtype)


def from_storage(stored: jax.Array, d: int, dtype: Any, packed: bool) -> jax.Array:
  """The inverse of `to_storage`: [B, d, d]."""
  return unpack(stored.astype(dtype), d) if packed else stored.astype(dtype)


def _upper(h: int) -> jax.Array:
  """[h + 1, h]: where the rectangle belongs to the first triangle."""
  return jnp.arange(h + 1)[:, None] <= jnp.arange(h)[None, :]


def _mirror(triangle: jax.Array) -> jax.Array:
  """A symmetric matrix from one of its triangles, diagonal included."""
  diagonal = jnp.eye(triangle.shape[-1], dtype=bool)
  return triangle + jnp.where(diagonal, 0, triangle).swapaxes(1, 2)
