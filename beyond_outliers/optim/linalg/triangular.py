"""Products of triangular and symmetric matrices by panels, which skip parts that are zero or known
by symmetry.

A panel is a band of rows of a D x D matrix, without the columns left of the band's diagonal block.
Four panels leave five eighths of the operations of Q X, and less than half of those of products of
two triangles.

Legend: D axis of a triangle, R the other axis of what it multiplies. A diagonal matrix is given as
a vector.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rows(d: int) -> list[slice]:
  """Rows of each panel: at most four panels, each a multiple of 128 and at least 256 rows but for
  the last."""
  step = max(256, -(-d // 512) * 128)
  return [slice(start, min(start + step, d)) for start in range(0, d, step)]


def times(q: jax.Array, x: jax.Array) -> jax.Array:
  """Q X, for Q upper triangular [D, D] or diagonal [D] and X [D, R] or [D]."""
  if q.ndim == 1:
    return _column(q, x) * x
  return jnp.concatenate([q[p, p.start :] @ x[p.start :] for p in rows(len(q))])


def transposed_times(q: jax.Array, x: jax.Array) -> jax.Array:
  """Qᵀ X."""
  if q.ndim == 1:
    return _column(q, x) * x
  return jnp.concatenate([q[: p.stop, p].T @ x[: p.stop] for p in rows(len(q))])


def transposed_solve(q: jax.Array, x: jax.Array) -> jax.Array:
  """Q⁻ᵀ X. A zero on the diagonal of Q counts as one: finite for Q = 0."""
  if q.ndim == 1:
    return x / _column(jnp.where(q == 0, 1, q), x)
  of, y = rows(len(q)), []
  for p in of:
    corner = jnp.where(jnp.eye(p.stop - p.start, dtype=bool) & (q[p, p] == 0), 1, q[p, p])
    rest = x[p] - sum(q[before, p].T @ y_before for before, y_before in zip(of, y, strict=False))
    y.append(
      jax.lax.linalg.triangular_solve(corner, rest, left_side=True, lower=False, transpose_a=True)
    )
  return jnp.concatenate(y)


def square(q: jax.Array) -> jax.Array:
  """QᵀQ, for Q [D, D]."""
  of = rows(len(q))
  panels = [q[: p.stop, p].T @ q[: p.stop, p.start :] for p in of]
  whole = []
  for i, panel in enumerate(panels):
    below = [panels[j][:, of[i].start - of[j].start : of[i].stop - of[j].start].T for j in range(i)]
    whole.append(jnp.concatenate([*below, panel], axis=1))
  return jnp.concatenate(whole)


def gram(x: jax.Array) -> list[jax.Array]:
  """The panels of X Xᵀ, for X [D, R]."""
  return [x[p] @ x[p.start :].T for p in rows(len(x))]


def column_squares(panels: list[jax.Array]) -> jax.Array:
  """Squared lengths [D] of the columns of a symmetric matrix given by its panels."""
  d = panels[0].shape[1]
  squares = jnp.zeros(d, panels[0].dtype)
  for p, panel in zip(rows(d), panels, strict=True):
    squares = squares.at[p.start :].add(jnp.sum(panel * panel, axis=0))
    squares = squares.at[p].add(jnp.sum(panel[:, p.stop - p.start :] ** 2, axis=1))
  return squares


def triangle_product(panels: list[jax.Array], q: jax.Array) -> jax.Array:
  """triu(T) Q, for a symmetric T given by its panels and Q [D, D]."""
  return jnp.concatenate(
    [
      jnp.pad(jnp.triu(panel) @ q[p.start :, p.start :], ((0, 0), (p.start, 0)))
      for p, panel in zip(rows(len(q)), panels, strict=True)
    ]
  )


def _column(q: jax.Array, x: jax.Array) -> jax.Array:
  return q.reshape(-1, *(1,) * (x.ndim - 1))
