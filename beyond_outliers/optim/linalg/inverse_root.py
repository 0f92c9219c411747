"""Inverse p-th roots A^(-1/p) of stacks of symmetric positive semi-definite matrices: one table of
methods.

Shapes: B matrices in a stack, d their width. Matrices of a stack never influence each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from beyond_outliers.ops import linalg
from beyond_outliers.optim.linalg.spectral_norm import spectral_norm

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

Basis = jax.Array | tuple[()]

# What a relative eps multiplies at least, so that the zero matrix has a root.
_SMALLEST_EIGENVALUE = 1e-25
_STALE = 0.1  # A carried basis is given up when it leaves more than this part of a matrix off the diagonal.
_TOLERANCE = (
  1e-6  # An iteration has arrived when no entry of a product that should be I is further off,
)
_MAX_STEPS = 100  # gives up after so many steps,
_MAX_GROWTH = 1.2  # or when its error grows by this factor,
_FAILURE = 0.05  # and begins again with ten times the eps if an entry is further off than this,
_MAX_ATTEMPTS = 6  # so often in all.


class Root(NamedTuple):
  """An inverse root, how good it is, and where to start next time."""

  root: jax.Array  # [B, d, d]
  residual: (
    jax.Array
  )  # [B]: how far from an inverse root; 0 is exact; not finite when the method failed
  condition: (
    jax.Array
  )  # [B]: A's largest eigenvalue over the smallest one taken; estimated from below by iterations
  basis: (
    Basis  # [B, d, d]: what the next call of a warm-started method starts from; () for the others
  )


class Orders(NamedTuple):
  """Which p a method can do."""

  accept: Callable[[float], bool]
  words: str


class Method(NamedTuple):
  """A row of ROOTS."""

  compute: Callable[
    ..., Root
  ]  # (a_BxDxD, p, eps, *, relative, basis); p and relative are static, eps may be traced
  warm: (
    bool  # whether it carries a basis; for a matrix that it has not seen yet, the identity or zeros
  )
  orders: Orders


def check(method: str, p: float) -> None:
  """Errors: ValueError when there is no such row, or it cannot compute A^(-1/p)."""
  if method not in ROOTS:
    raise ValueError(f"root = {method!r}: no such method; choose one of {', '.join(ROOTS)}")
  orders = ROOTS[method].orders
  if not orders.accept(p):
    able = [name for name, row in ROOTS.items() if row.orders.accept(p)]
    remedy = (
      f"choose {' or '.join(able)}, or another exponent" if able else "choose another exponent"
    )
    raise ValueError(
      f"root = {method!r}, p = {p}: this method computes A^(-1/p) for {orders.words} only; {remedy}"
    )


def orthogonal_iteration(
  a_BxDxD: jax.Array, basis_BxDxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One step of orthogonal iteration towards the eigenvectors of A, largest eigenvalue first (arXiv
  2409.11321, algorithm 4).

  Returns the new basis [B, d, d]; the Rayleigh quotients diag(QᵀAQ) [B, d] of the basis given, in
  descending order; and the permutation [B, d] that sorted them: column j of the new basis continues
  column permutation[j] of the one given. The new basis is orthonormal whatever A is."""
  rows_BxDxD = _transpose(basis_BxDxD)
  image_BxDxD = _matmul(rows_BxDxD, a_BxDxD)
  eigenvalues_BxD = jnp.sum(rows_BxDxD * image_BxDxD, axis=-1)
  order_BxD = jnp.argsort(eigenvalues_BxD, axis=-1, descending=True)
  sorted_BxDxD = jnp.take_along_axis(image_BxDxD, order_BxD[:, :, None], axis=-2)
  return (
    linalg.qr(_transpose(sorted_BxDxD)),
    jnp.take_along_axis(eigenvalues_BxD, order_BxD, axis=-1),
    order_BxD,
  )


def _eigh(a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: Basis) -> Root:
  """By the eigendecomposition. Its residual is a backward error, for one random vector: it stays
  small for an ill-conditioned A, whose root no method can compute to a small forward error.

  Costs little more than the decomposition. A matrix whose decomposition fails has a residual that
  isn't finite."""
  eigenvalues_BxD, basis_BxDxD = linalg.eigh(a_BxDxD)
  root_BxDxD, finite_B, condition_B = _from_eigenvectors(
    basis_BxDxD, eigenvalues_BxD, p, eps, relative
  )

  rows_BxDxD = _transpose(basis_BxDxD)
  z_D = _probe(a_BxDxD)
  qz_BxD = _einsum("bki,i->bk", rows_BxDxD, z_D)
  back_Bx2xD = _einsum(
    "bnk,bki->bni", jnp.stack([eigenvalues_BxD * qz_BxD, qz_BxD], axis=1), rows_BxDxD
  )
  image_BxD = _einsum("bij,j->bi", a_BxDxD, z_D)
  norm_B = _largest(eigenvalues_BxD)
  residual_B = jnp.linalg.norm(
    (image_BxD - back_Bx2xD[:, 0]) / norm_B[:, None], axis=-1
  ) + jnp.linalg.norm(z_D - back_Bx2xD[:, 1], axis=-1)
  return Root(root_BxDxD, jnp.where(finite_B, residual_B, jnp.inf), condition_B, ())


def _qr(a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: jax.Array) -> Root:
  """By one step of orthogonal iteration from the basis of the last call, and the Rayleigh quotients
  in the new one.

  The residual is the off-diagonal part of QᵀAQ relative to A, in Frobenius norms: it says how stale
  the basis is. A matrix for which it is above 0.1 after the step, such as one that comes without a
  basis, is decomposed after all, alone: from the identity, orthogonal iteration needs hundreds of
  steps. A matrix without a finite residual keeps the basis that it came with."""

  def measured(basis_BxDxD):
    rows_BxDxD = _transpose(basis_BxDxD)
    image_BxDxD = _matmul(rows_BxDxD, a_BxDxD)
    eigenvalues_BxD = jnp.sum(rows_BxDxD * image_BxDxD, axis=-1)
    scale_B = _largest(eigenvalues_BxD)
    off_B = jnp.linalg.norm(
      (image_BxDxD - rows_BxDxD * eigenvalues_BxD[:, :, None]) / _each(scale_B), axis=(-2, -1)
    )
    on_B = jnp.linalg.norm(eigenvalues_BxD / scale_B[:, None], axis=-1)
    return basis_BxDxD, eigenvalues_BxD, off_B / jnp.maximum(jnp.hypot(off_B, on_B), 1)

  def decomposed(basis_BxDxD, stale_B):
    eigenvectors = lambda a_DxD, _: linalg.eigh(a_DxD[None])[1][0, :, ::-1]
    return measured(
      lax.map(
        lambda each: lax.cond(each[0], eigenvectors, lambda _, basis_DxD: basis_DxD, *each[1:]),
        (stale_B, a_BxDxD, basis_BxDxD),
      )
    )

  stepped = measured(orthogonal_iteration(a_BxDxD, basis)[0])
  stale_B = ~(stepped[-1] <= _STALE)
  basis_BxDxD, eigenvalues_BxD, residual_B = lax.cond(
    jnp.any(stale_B), lambda: decomposed(stepped[0], stale_B), lambda: stepped
  )
  root_BxDxD, finite_B, condition_B = _from_eigenvectors(
    basis_BxDxD, eigenvalues_BxD, p, eps, relative
  )
  residual_B = jnp.where(finite_B, residual_B, jnp.inf)
  return Root(
    root_BxDxD,
    residual_B,
    condition_B,
    jnp.where(_each(jnp.isfinite(residual_B)), basis_BxDxD, basis),
  )


def _newton(a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: Basis) -> Root:
  """By the coupled inverse Newton iteration (Higham, Functions of Matrices, 7.18), scaled by the
  Frobenius norm: matrix products only. X_k -> A^(-1/p) while M_k = X_k^p A -> I; the residual is
  max|M - I|.

  In float32 a matrix with (nearly) a null space loses definiteness on the way, and the iteration
  diverges: such a matrix begins again with ten times the eps, up to six times in all. What it gives
    then is a root at that larger eps."""
  order = int(p)
  eye_DxD = jnp.eye(a_BxDxD.shape[-1], dtype=a_BxDxD.dtype)

  def begin(ridge_B):
    damped_BxDxD = a_BxDxD + _each(ridge_B) * eye_DxD
    scale_B = (order + 1) / (2 * _norm(damped_BxDxD))
    return _each(scale_B ** (1 / order)) * eye_DxD, _each(scale_B) * damped_BxDxD

  def step(state):
    x_BxDxD, m_BxDxD = state
    factor_BxDxD = ((order + 1) * eye_DxD - m_BxDxD) / order
    return _matmul(x_BxDxD, factor_BxDxD), _matmul(_power(factor_BxDxD, order), m_BxDxD)

  (x_BxDxD, _), residual_B = _until_identity(
    begin, step, _ridge(a_BxDxD, eps, relative), _MAX_ATTEMPTS
  )
  return _iterated(a_BxDxD, _symmetric(x_BxDxD), residual_B, p)


def _denman_beavers(
  a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: Basis
) -> Root:
  """By Newton-Denman-Beavers iterations (arXiv 2602.02016; Higham, Functions of Matrices, chapter
  6), scaled by a power
  iteration: matrix products only, no solves. Y_k -> A^(1/2) and Z_k -> A^(-1/2); the residual is
    max|ZY - I|.

  A^(-1/4) is the inverse square root of the square root, and so on. Unlike the paper's ten steps,
  this iterates until it has arrived, and like `newton` it begins again with ten times the eps where
  it diverges."""
  root_BxDxD, inverse_BxDxD, residual_B = _square_roots(
    a_BxDxD, _ridge(a_BxDxD, eps, relative), _MAX_ATTEMPTS
  )
  for _ in range(round(math.log2(p)) - 1):
    root_BxDxD, inverse_BxDxD, again_B = _square_roots(root_BxDxD, jnp.zeros_like(residual_B), 1)
    residual_B = jnp.maximum(residual_B, again_B)
  return _iterated(a_BxDxD, _symmetric(inverse_BxDxD), residual_B, p)


def _square_roots(a_BxDxD, ridge_B, attempts: int):
  """(A + ridge I)^(1/2), its inverse and max|ZY - I|."""
  eye_DxD = jnp.eye(a_BxDxD.shape[-1], dtype=a_BxDxD.dtype)
  eigenvalue_B = _largest_eigenvalue(a_BxDxD)

  def begin(ridge_B):
    damped_BxDxD, scale_B = a_BxDxD + _each(ridge_B) * eye_DxD, eigenvalue_B + ridge_B
    root_B = jnp.sqrt(scale_B)
    return damped_BxDxD / _each(root_B), eye_DxD / _each(root_B), damped_BxDxD / _each(scale_B)

  def step(state):
    y_BxDxD, z_BxDxD, product_BxDxD = state
    factor_BxDxD = 1.5 * eye_DxD - 0.5 * product_BxDxD
    y_BxDxD, z_BxDxD = _matmul(y_BxDxD, factor_BxDxD), _matmul(factor_BxDxD, z_BxDxD)
    return y_BxDxD, z_BxDxD, _matmul(z_BxDxD, y_BxDxD)

  (y_BxDxD, z_BxDxD, _), residual_B = _until_identity(begin, step, ridge_B, attempts)
  return y_BxDxD, z_BxDxD, residual_B


class _Progress(NamedTuple):
  """Of one iteration on a stack: each matrix is at its own step of its own attempt."""

  state: tuple[jax.Array, ...]  # of [B, d, d]; the last should become I
  error: (
    jax.Array
  )  # [B]: |last - I| in the Frobenius norm, which falls steadily where the iteration converges
  residual: jax.Array  # [B]: max|last - I|, what the tolerance is about
  step: jax.Array  # [B]
  attempt: jax.Array  # [B]
  ridge: jax.Array  # [B]
  active: jax.Array  # [B]


def _until_identity(
  begin: Callable, step: Callable, ridge_B: jax.Array, max_attempts: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Iterates each matrix of a stack on its own until the last entry of its state is I, in one loop.

  begin: ridge [B] -> state; step: state -> state; a state is a tuple of [B, d, d]. Returns the
  states and max|last - I|, [B]. A matrix stops when it has arrived, or keeps the state before when
  rounding has won: its error grows, or doesn't even halve where it is so small that it should
  square. The last entry is kept symmetric: without that, rounding can lead it to I while the root
  becomes indefinite."""

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
      residual_B > _TOLERANCE,
    )

  def distance(state):
    off_BxDxD = state[-1] - jnp.eye(state[-1].shape[-1], dtype=state[-1].dtype)
    return jnp.linalg.norm(off_BxDxD, axis=(-2, -1)), jnp.max(jnp.abs(off_BxDxD), axis=(-2, -1))

  def advance(old: _Progress) -> _Progress:
    *state, product_BxDxD = step(old.state)
    state = (*state, _symmetric(product_BxDxD))
    error_B, residual_B = distance(state)
    accepted_B = old.active & (error_B < jnp.where(old.error < 0.5, 0.5, _MAX_GROWTH) * old.error)
    new = _where(accepted_B, old._replace(state=state, error=error_B, residual=residual_B), old)
    active_B = accepted_B & (new.residual > _TOLERANCE) & (old.step + 1 < _MAX_STEPS)
    new = new._replace(step=old.step + 1, active=active_B)
    failed_B = (
      old.active & ~new.active & (new.residual > _FAILURE) & (old.attempt + 1 < max_attempts)
    )
    return lax.cond(
      jnp.any(failed_B),
      lambda: _where(failed_B, enter(10 * old.ridge, old.attempt + 1), new),
      lambda: new,
    )

  start = enter(ridge_B, jnp.zeros(ridge_B.shape, jnp.int32))
  end = lax.while_loop(lambda progress: jnp.any(progress.active), advance, start)
  return end.state, end.residual


def _iterated(a_BxDxD: jax.Array, root_BxDxD: jax.Array, residual_B: jax.Array, p: float) -> Root:
  """What an iteration has found, with the condition from the norms of matrix and root."""
  return Root(root_BxDxD, residual_B, spectral_norm(a_BxDxD) * spectral_norm(root_BxDxD) ** p, ())


def _symmetric(x_BxDxD: jax.Array) -> jax.Array:
  """The symmetric part. The rest is rounding in what an iteration finds, but can be larger than the
  smallest eigenvalues."""
  return 0.5 * (x_BxDxD + _transpose(x_BxDxD))


def _where(mask_B: jax.Array, yes: Any, no: Any) -> Any:
  """A tree of one or the other, matrix by matrix of the stack."""
  return jax.tree.map(
    lambda x, y: jnp.where(mask_B.reshape(-1, *[1] * (x.ndim - 1)), x, y), yes, no
  )


def _each(x_B: jax.Array) -> jax.Array:
  """One number a matrix, to multiply a stack by."""
  return x_B[:, None, None]


def _transpose(x_BxDxD: jax.Array) -> jax.Array:
  """LAPACK returns matrices by columns: who works with their transposes has nothing transposed in
  memory."""
  return jnp.swapaxes(x_BxDxD, -2, -1)


def _from_eigenvectors(
  basis_BxDxD, eigenvalues_BxD, p: float, eps: Any, relative: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Q L^(-1/p) Qᵀ, whether it is finite, and the largest eigenvalue over the smallest of L. L are
  the eigenvalues plus eps, made positive as each reference does it.

  Absolute (Meta): rounding may leave eigenvalues below zero; all are shifted until the smallest is
  zero, then eps is added. Relative (Google): eigenvalues below zero become zero, and eps times the
  largest is added."""
  if relative:
    ridge_Bx1 = eps * jnp.maximum(
      jnp.max(eigenvalues_BxD, axis=-1, keepdims=True), _SMALLEST_EIGENVALUE
    )
    positive_BxD = jnp.maximum(eigenvalues_BxD, 0) + ridge_Bx1
  else:
    positive_BxD = (
      eigenvalues_BxD - jnp.minimum(jnp.min(eigenvalues_BxD, axis=-1, keepdims=True), 0) + eps
    )
  half_BxD = positive_BxD ** (-0.5 / p)
  half_BxDxD = _transpose(basis_BxDxD) * half_BxD[:, :, None]
  condition_B = jnp.max(eigenvalues_BxD, axis=-1) / jnp.maximum(
    jnp.min(positive_BxD, axis=-1), jnp.finfo(half_BxD.dtype).tiny
  )
  return (
    _einsum("bki,bkj->bij", half_BxDxD, half_BxDxD),
    jnp.all(jnp.isfinite(half_BxD), axis=-1),
    condition_B,
  )


def _ridge(a_BxDxD: jax.Array, eps: Any, relative: bool) -> jax.Array:
  """What is added to the diagonal of each matrix, [B]."""
  if relative:
    return eps * jnp.maximum(_largest_eigenvalue(a_BxDxD), _SMALLEST_EIGENVALUE)
  return jnp.full(a_BxDxD.shape[0], eps, a_BxDxD.dtype)


def _largest_eigenvalue(a_BxDxD: jax.Array, max_steps: int = 100) -> jax.Array:
  """By power iteration, [B]: from below, until it changes by less than 1e-6 of itself."""
  scale_B = _largest(a_BxDxD)

  def unit(v_BxD):
    return v_BxD / jnp.maximum(
      jnp.linalg.norm(v_BxD, axis=-1, keepdims=True), jnp.finfo(v_BxD.dtype).tiny
    )

  def advance(carry):
    step, v_BxD, old_B, active_B = carry
    image_BxD = _einsum("bij,bj->bi", a_BxDxD, v_BxD) / scale_B[:, None]
    new_B = jnp.where(active_B, jnp.sum(v_BxD * image_BxD, axis=-1), old_B)
    return (
      step + 1,
      unit(image_BxD),
      new_B,
      active_B & (jnp.abs(new_B - old_B) > 1e-6 * jnp.abs(new_B)),
    )

  start = (
    0,
    jnp.broadcast_to(unit(_probe(a_BxDxD)), a_BxDxD.shape[:-1]),
    jnp.zeros_like(scale_B),
    jnp.full(scale_B.shape, True),
  )
  _, _, eigenvalue_B, _ = lax.while_loop(
    lambda carry: (carry[0] < max_steps) & jnp.any(carry[3]), advance, start
  )
  return scale_B * jnp.abs(eigenvalue_B)


def _probe(a_BxDxD: jax.Array) -> jax.Array:
  """The same normal random vector [d] every time: |E z| estimates the Frobenius norm of an E that
  knows nothing of it."""
  return jnp.asarray(np.random.default_rng(0).standard_normal(a_BxDxD.shape[-1]), a_BxDxD.dtype)


def _largest(x: jax.Array) -> jax.Array:
  """The largest magnitude, or what keeps a zero from dividing, [B]."""
  return jnp.maximum(jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim))), jnp.finfo(x.dtype).tiny)


def _norm(x_BxDxD: jax.Array) -> jax.Array:
  """Frobenius norms, [B]: squares of small entries don't underflow."""
  scale_B = _largest(x_BxDxD)
  return scale_B * jnp.linalg.norm(x_BxDxD / _each(scale_B), axis=(-2, -1))


def _power(x_BxDxD: jax.Array, n: int) -> jax.Array:
  """X^n by squaring."""
  if n == 1:
    return x_BxDxD
  half_BxDxD = _power(x_BxDxD, n // 2)
  square_BxDxD = _matmul(half_BxDxD, half_BxDxD)
  return _matmul(square_BxDxD, x_BxDxD) if n % 2 else square_BxDxD


_ANY = Orders(lambda p: 0 < p < math.inf, "finite p > 0")
_INTEGERS = Orders(lambda p: p >= 1 and p % 1 == 0, "p = 1, 2, 3, ...")
_POWERS_OF_TWO = Orders(lambda p: p >= 2 and math.log2(p) % 1 == 0, "p = 2, 4, 8, ...")

# (a_BxDxD, p, eps, *, relative, basis) -> Root: the root of A + eps I, or with `relative` of A +
# eps λmax I. float32 or float64.
ROOTS: dict[str, Method] = {
  "eigh": Method(_eigh, False, _ANY),
  "newton": Method(_newton, False, _INTEGERS),
  "denman_beavers": Method(_denman_beavers, False, _POWERS_OF_TWO),
  "qr": Method(_qr, True, _ANY),
}
