"""Coupled iterations for inverse roots: matrix products only; each matrix iterates to convergence.

Shapes: B matrices in a stack, d their width. Matrices of a stack never influence each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops.extremes import max_magnitude
from beyond_outliers.optim.linalg.stacks import each, frobenius_norm, largest_eigenvalue, matmul

TOLERANCE = 1e-6  # converged: no entry of the product that should be I is further off
MAX_STEPS = 100  # an iteration stops after this many steps,
MAX_GROWTH = 1.2  # or when its error grows by this factor;
FAILURE = 0.05  # if then an entry is further off than this, it restarts with ten times the ridge:
MAX_ATTEMPTS = 6  # this many attempts in all


def inverse_newton(
  a_BxDxD: jax.Array, order: int, ridge_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(A + ridge I)^(-1/order) [B, d, d] by the coupled inverse Newton iteration (Higham, Functions
  of Matrices, 7.18), scaled by the Frobenius norm, and its residual [B].

  X_k -> A^(-1/p) while M_k = X_k^p A -> I; the residual is max|M - I|. In float32 a (nearly)
  singular matrix loses definiteness on the way and the iteration diverges: it restarts with ten
  times the ridge, for at most six attempts in all. The root is then one for that larger ridge."""
  eye_DxD = jnp.eye(a_BxDxD.shape[-1], dtype=a_BxDxD.dtype)

  def begin(ridge_B):
    damped_BxDxD = a_BxDxD + each(ridge_B) * eye_DxD
    scale_B = (order + 1) / (2 * frobenius_norm(damped_BxDxD))
    return each(scale_B ** (1 / order)) * eye_DxD, each(scale_B) * damped_BxDxD

  def step(state):
    x_BxDxD, m_BxDxD = state
    factor_BxDxD = ((order + 1) * eye_DxD - m_BxDxD) / order
    return matmul(x_BxDxD, factor_BxDxD), matmul(_power(factor_BxDxD, order), m_BxDxD)

  (x_BxDxD, _), residual_B = _until_identity(begin, step, ridge_B, MAX_ATTEMPTS)
  return _symmetric(x_BxDxD), residual_B


def denman_beavers(a_BxDxD: jax.Array, p: float, ridge_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(A + ridge I)^(-1/p) [B, d, d] by Newton-Denman-Beavers iterations (arXiv 2602.02016; Higham,
  Functions of Matrices, chapter 6), scaled by a power iteration, and its residual [B]. No solves.

  Y_k -> A^(1/2) and Z_k -> A^(-1/2); the residual is max|ZY - I|. A^(-1/4) is the inverse square
  root of the square root, and so on. Where the paper takes ten steps, this iterates to convergence;
  like `inverse_newton` it restarts with ten times the ridge where it diverges."""
  root_BxDxD, inverse_BxDxD, residual_B = _square_roots(a_BxDxD, ridge_B, MAX_ATTEMPTS)
  for _ in range(round(math.log2(p)) - 1):
    root_BxDxD, inverse_BxDxD, again_B = _square_roots(root_BxDxD, jnp.zeros_like(residual_B), 1)
    residual_B = jnp.maximum(residual_B, again_B)
  return _symmetric(inverse_BxDxD), residual_B


def _square_roots(a_BxDxD, ridge_B, attempts: int):
  """(A + ridge I)^(1/2), its inverse and max|ZY - I|."""
  eye_DxD = jnp.eye(a_BxDxD.shape[-1], dtype=a_BxDxD.dtype)
  eigenvalue_B = largest_eigenvalue(a_BxDxD)

  def begin(ridge_B):
    damped_BxDxD, scale_B = a_BxDxD + each(ridge_B) * eye_DxD, eigenvalue_B + ridge_B
    root_B = jnp.sqrt(scale_B)
    return damped_BxDxD / each(root_B), eye_DxD / each(root_B), damped_BxDxD / each(scale_B)

  def step(state):
    y_BxDxD, z_BxDxD, product_BxDxD = state
    factor_BxDxD = 1.5 * eye_DxD - 0.5 * product_BxDxD
    y_BxDxD, z_BxDxD = matmul(y_BxDxD, factor_BxDxD), matmul(factor_BxDxD, z_BxDxD)
    return y_BxDxD, z_BxDxD, matmul(z_BxDxD, y_BxDxD)

  (y_BxDxD, z_BxDxD, _), residual_B = _until_identity(begin, step, ridge_B, attempts)
  return y_BxDxD, z_BxDxD, residual_B


class _Progress(NamedTuple):
  """Progress of an iteration on a stack: each matrix is at its own step of its own attempt."""

  state: tuple[jax.Array, ...]  # arrays [B, d, d]; the last should become I
  # [B]: |last - I| in the Frobenius norm, which falls steadily where the iteration converges
  error: jax.Array
  residual: jax.Array  # [B]: max|last - I|, which is compared with the tolerance
  step: jax.Array  # [B]
  attempt: jax.Array  # [B]
  ridge: jax.Array  # [B]
  active: jax.Array  # [B]


def _until_identity(
  begin: Callable, step: Callable, ridge_B: jax.Array, max_attempts: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Iterates every matrix of a stack, in one loop, until the last entry of its own state is I.

  begin: ridge [B] -> state; step: state -> state; a state is a tuple of arrays [B, d, d]. Returns
  the states and max|last - I|, [B]. A matrix stops when it has converged. When rounding dominates
  it stops at its previous state: its error has grown, or is so small that a step should square it
  but has not even halved it. The last entry is kept symmetric: otherwise rounding can lead it to I
  while the root becomes indefinite."""

  def enter(ridge_B, attempt_B) -> _Progress:
    state = begin(ridge_B)
    error_B, residual_B = distance(state)
    return _Progress(
      state,
      error_B,
      residual_B,
      jnp.zeros_like(attempt_B),
      attempt_B,
      ridge_B,
      residual_B > TOLERANCE,
    )

  def distance(state):
    off_BxDxD = state[-1] - jnp.eye(state[-1].shape[-1], dtype=state[-1].dtype)
    return jnp.linalg.norm(off_BxDxD, axis=(-2, -1)), max_magnitude(off_BxDxD, (-2, -1))

  def advance(old: _Progress) -> _Progress:
    *state, product_BxDxD = step(old.state)
    state = (*state, _symmetric(product_BxDxD))
    error_B, residual_B = distance(state)
    accepted_B = old.active & (error_B < jnp.where(old.error < 0.5, 0.5, MAX_GROWTH) * old.error)
    new = _where(accepted_B, old._replace(state=state, error=error_B, residual=residual_B), old)
    active_B = accepted_B & (new.residual > TOLERANCE) & (old.step + 1 < MAX_STEPS)
    new = new._replace(step=old.step + 1, active=active_B)
    failed_B = (
      old.active & ~new.active & (new.residual > FAILURE) & (old.attempt + 1 < max_attempts)
    )
    return lax.cond(
      jnp.any(failed_B),
      lambda: _where(failed_B, enter(10 * old.ridge, old.attempt + 1), new),
      lambda: new,
    )

  start = enter(ridge_B, jnp.zeros(ridge_B.shape, jnp.int32))
  end = lax.while_loop(lambda progress: jnp.any(progress.active), advance, start)
  return end.state, end.residual


def _symmetric(x_BxDxD: jax.Array) -> jax.Array:
  """The symmetric part.

  In an iteration's result the rest is rounding, but it can exceed the smallest eigenvalues."""
  return 0.5 * (x_BxDxD + x_BxDxD.mT)


def _where(mask_B: jax.Array, yes: Any, no: Any) -> Any:
  """jnp.where over trees of stacks: for each matrix, `yes` or `no`."""
  return jax.tree.map(
    lambda x, y: jnp.where(mask_B.reshape(-1, *[1] * (x.ndim - 1)), x, y), yes, no
  )


def _power(x_BxDxD: jax.Array, n: int) -> jax.Array:
  """X^n by squaring."""
  if n == 1:
    return x_BxDxD
  half_BxDxD = _power(x_BxDxD, n // 2)
  square_BxDxD = matmul(half_BxDxD, half_BxDxD)
  return matmul(square_BxDxD, x_BxDxD) if n % 2 else square_BxDxD
