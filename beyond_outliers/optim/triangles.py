"""Products of triangular and of symmetric matrices by panels, without the parts that are zero or known.

A panel is some rows of a D x D upper triangle: columns from the first of these rows on. Of the operations of whole products
four panels leave five eighths for Q X, three eighths for products of two triangles. Legend: D, R axes of what is multiplied.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp


def rows(d: int) -> list[slice]:
  """Of the panels: at most four, multiples of 128 and at least 256 of them each but the last."""
  step = max(256, -(-d // 512) * 128)
  return [slice(start, min(start + step, d)) for start in range(0, d, step)]


def times(q: jax.Array, x: jax.Array) -> jax.Array:
  """Q X, for Q upper triangular [D, D] or diagonal [D] and X [D, R] or [D]."""
  if q.ndim == 1:
    return diagonal(q, x) * x
  return jnp.concatenate([q[p, p.start:] @ x[p.start:] for p in rows(len(q))])


def times_transposed(q: jax.Array, x: jax.Array) -> jax.Array:
  """Qᵀ X."""
  if q.ndim == 1:
    return diagonal(q, x) * x
  return jnp.concatenate([q[:p.stop, p].T @ x[:p.stop] for p in rows(len(q))])


def solve(q: jax.Array, x: jax.Array) -> jax.Array:
  """Q⁻ᵀ X; rows of X at which the diagonal of Q is zero are taken as they are, so that Q = 0 gives X."""
  safe = lambda diagonal_D: jnp.where(diagonal_D == 0, 1, diagonal_D)
  if q.ndim == 1:
    return x / diagonal(safe(q), x)
  y = x[:0]
  for p in rows(len(q)):
    corner = q[p, p]
    corner += jnp.diag(safe(jnp.diagonal(corner)) - jnp.diagonal(corner))
    y_p = jax.lax.linalg.triangular_solve(corner, x[p] - q[:p.start, p].T @ y, left_side=True, lower=False, transpose_a=True)
    y = jnp.concatenate([y, y_p])
  return y


def square(q: jax.Array) -> jax.Array:
  """QᵀQ, for Q [D, D]."""
  return mirror([q[:p.stop, p].T @ q[:p.stop, p.start:] for p in rows(len(q))])


def gram(x: jax.Array) -> list[jax.Array]:
  """The panels of X Xᵀ."""
  return [x[p] @ x[p.start:].T for p in rows(len(x))]


def mirror(panels: list[jax.Array]) -> jax.Array:
  """The symmetric matrix of which these are the panels."""
  of = rows(panels[0].shape[1])
  below = lambda i: [panels[j][:, of[i].start - of[j].start: of[i].stop - of[j].start].T for j in range(i)]
  return jnp.concatenate([jnp.concatenate([*below(i), panel], axis=1) for i, panel in enumerate(panels)])


def product(panels: list[jax.Array], q: jax.Array) -> jax.Array:
  """T Q, for T given by its panels, both upper triangular."""
  return jnp.concatenate([jnp.pad(panel @ q[p.start:, p.start:], ((0, 0), (p.start, 0)))
                          for panel, p in zip(panels, rows(len(q)), strict=True)])


def diagonal(q: jax.Array, x: jax.Array) -> jax.Array:
  return q.reshape(-1, *(1,) * (x.ndim - 1))
