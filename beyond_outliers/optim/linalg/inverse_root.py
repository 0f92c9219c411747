"""Inverse p-th roots A^(-1/p) of stacks of symmetric positive semi-definite matrices.

Shapes: B matrices in a stack, d their width. Matrices of a stack never influence each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops import linalg
from beyond_outliers.ops.extremes import max_or_nan, min_or_nan
from beyond_outliers.optim.linalg.coupled_iterations import denman_beavers, inverse_newton
from beyond_outliers.optim.linalg.spectral_norm import spectral_norm
from beyond_outliers.optim.linalg.stacks import (
  each,
  einsum,
  largest,
  largest_eigenvalue,
  matmul,
  probe,
)

Basis = jax.Array | tuple[()]

# Lower bound of what a relative eps multiplies, so that the zero matrix has a root.
SMALLEST_EIGENVALUE = 1e-25
# A carried basis is discarded when it leaves more than this fraction of a matrix off the diagonal.
STALE = 0.1


class Root(NamedTuple):
  """An inverse root, how good it is, and where to start next time."""

  root: jax.Array  # [B, d, d]
  # [B]: how far from an exact inverse root, for which it is 0; not finite when the method failed
  residual: jax.Array
  # [B]: A's largest eigenvalue over its smallest with eps added; iterations bound it from below
  condition: jax.Array
  # [B, d, d]: what the next call of a warm-started method starts from; () for the others
  basis: Basis


class Orders(NamedTuple):
  """Orders p that a method can compute."""

  accept: Callable[[float], bool]
  words: str


class RootMethod(NamedTuple):
  """A row of ROOTS."""

  # (a_BxDxD, p, eps, *, relative, basis); p and relative are static, eps may be traced
  compute: Callable[..., Root]
  # whether it carries a basis over; for a matrix that it has not seen yet, the identity or zeros
  warm: bool
  orders: Orders


def check(method: str, p: float) -> None:
  """Refuses an unknown method, and one that cannot compute A^(-1/p). Errors: ValueError."""
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
  """One step of orthogonal iteration towards the eigenvectors of A, largest eigenvalue first.

  arXiv 2409.11321, algorithm 4.

  Returns the new basis [B, d, d]; the Rayleigh quotients diag(QᵀAQ) [B, d] of the given basis, in
  descending order; and the permutation [B, d] that sorted them: column j of the new basis continues
  column permutation[j] of the given one. The new basis is orthonormal for any A."""
  rows_BxDxD = basis_BxDxD.mT
  image_BxDxD = matmul(rows_BxDxD, a_BxDxD)
  eigenvalues_BxD = jnp.sum(rows_BxDxD * image_BxDxD, axis=-1)
  order_BxD = jnp.argsort(eigenvalues_BxD, axis=-1, descending=True)
  sorted_BxDxD = jnp.take_along_axis(image_BxDxD, order_BxD[:, :, None], axis=-2)
  return (
    linalg.qr(sorted_BxDxD.mT),
    jnp.take_along_axis(eigenvalues_BxD, order_BxD, axis=-1),
    order_BxD,
  )


def _eigh(a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: Basis) -> Root:
  """Root by eigendecomposition.

  The residual is a backward error on one random vector: it stays small for an ill-conditioned A,
  whose root no method can compute to a small forward error. It costs little beyond the
  decomposition, and is not finite if that fails."""
  eigenvalues_BxD, basis_BxDxD = linalg.eigh(a_BxDxD)
  root_BxDxD, finite_B, condition_B = _from_eigenvectors(
    basis_BxDxD, eigenvalues_BxD, p, eps, relative
  )

  rows_BxDxD = basis_BxDxD.mT
  z_D = probe(a_BxDxD)
  qz_BxD = einsum("bki,i->bk", rows_BxDxD, z_D)
  back_Bx2xD = einsum(
    "bnk,bki->bni", jnp.stack([eigenvalues_BxD * qz_BxD, qz_BxD], axis=1), rows_BxDxD
  )
  image_BxD = einsum("bij,j->bi", a_BxDxD, z_D)
  norm_B = largest(eigenvalues_BxD)
  residual_B = jnp.linalg.norm(
    (image_BxD - back_Bx2xD[:, 0]) / norm_B[:, None], axis=-1
  ) + jnp.linalg.norm(z_D - back_Bx2xD[:, 1], axis=-1)
  return Root(root_BxDxD, jnp.where(finite_B, residual_B, jnp.inf), condition_B, ())


def _qr(a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: jax.Array) -> Root:
  """Root from the Rayleigh quotients in a basis that is one step of orthogonal iteration from that
  of the last call.

  The residual is the off-diagonal part of QᵀAQ relative to A, in Frobenius norms: how stale the
  basis is. A matrix whose residual is above 0.1 after the step, such as one without a basis yet, is
  decomposed on its own: from the identity, orthogonal iteration would need hundreds of steps. A
  matrix whose residual is not finite keeps the basis it was given."""

  def measured(basis_BxDxD):
    rows_BxDxD = basis_BxDxD.mT
    image_BxDxD = matmul(rows_BxDxD, a_BxDxD)
    eigenvalues_BxD = jnp.sum(rows_BxDxD * image_BxDxD, axis=-1)
    scale_B = largest(eigenvalues_BxD)
    off_B = jnp.linalg.norm(
      (image_BxDxD - rows_BxDxD * eigenvalues_BxD[:, :, None]) / each(scale_B), axis=(-2, -1)
    )
    on_B = jnp.linalg.norm(eigenvalues_BxD / scale_B[:, None], axis=-1)
    return basis_BxDxD, eigenvalues_BxD, off_B / jnp.maximum(jnp.hypot(off_B, on_B), 1)

  def decomposed(basis_BxDxD, stale_B):
    def eigenvectors(a_DxD, _):
      return linalg.eigh(a_DxD[None])[1][0, :, ::-1]

    def unless_stale(one):
      return lax.cond(one[0], eigenvectors, lambda _, basis_DxD: basis_DxD, *one[1:])

    return measured(lax.map(unless_stale, (stale_B, a_BxDxD, basis_BxDxD)))

  stepped = measured(orthogonal_iteration(a_BxDxD, basis)[0])
  stale_B = ~(stepped[-1] <= STALE)
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
    jnp.where(each(jnp.isfinite(residual_B)), basis_BxDxD, basis),
  )


def _from_eigenvectors(
  basis_BxDxD, eigenvalues_BxD, p: float, eps: Any, relative: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Q L^(-1/p) Qᵀ, whether it is finite, and the largest eigenvalue over the smallest of L.

  L are the eigenvalues, which rounding may leave below zero, made positive. Absolute (Meta): if any
  is negative, all are shifted until the smallest is zero, then eps is added. Relative (Google):
  negative ones become zero, and eps times the largest is added."""
  if relative:
    ridge_Bx1 = eps * jnp.maximum(
      max_or_nan(eigenvalues_BxD, -1, keepdims=True), SMALLEST_EIGENVALUE
    )
    positive_BxD = jnp.maximum(eigenvalues_BxD, 0) + ridge_Bx1
  else:
    positive_BxD = (
      eigenvalues_BxD - jnp.minimum(min_or_nan(eigenvalues_BxD, -1, keepdims=True), 0) + eps
    )
  half_BxD = positive_BxD ** (-0.5 / p)
  half_BxDxD = basis_BxDxD.mT * half_BxD[:, :, None]
  condition_B = max_or_nan(eigenvalues_BxD, -1) / jnp.maximum(
    min_or_nan(positive_BxD, -1), jnp.finfo(half_BxD.dtype).tiny
  )
  return (
    einsum("bki,bkj->bij", half_BxDxD, half_BxDxD),
    jnp.all(jnp.isfinite(half_BxD), axis=-1),
    condition_B,
  )


def _newton(a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: Basis) -> Root:
  """Root by coupled_iterations.inverse_newton."""
  return _iterated(a_BxDxD, p, *inverse_newton(a_BxDxD, int(p), _ridge(a_BxDxD, eps, relative)))


def _denman_beavers(
  a_BxDxD: jax.Array, p: float, eps: Any, *, relative: bool, basis: Basis
) -> Root:
  """Root by coupled_iterations.denman_beavers."""
  return _iterated(a_BxDxD, p, *denman_beavers(a_BxDxD, p, _ridge(a_BxDxD, eps, relative)))


def _iterated(a_BxDxD: jax.Array, p: float, root_BxDxD: jax.Array, residual_B: jax.Array) -> Root:
  """The Root of an iteration, its condition taken from the spectral norms of matrix and root."""
  return Root(root_BxDxD, residual_B, spectral_norm(a_BxDxD) * spectral_norm(root_BxDxD) ** p, ())


def _ridge(a_BxDxD: jax.Array, eps: Any, relative: bool) -> jax.Array:
  """What is added to each matrix's diagonal, [B]: eps, or eps times the largest eigenvalue."""
  if relative:
    return eps * jnp.maximum(largest_eigenvalue(a_BxDxD), SMALLEST_EIGENVALUE)
  return jnp.full(a_BxDxD.shape[0], eps, a_BxDxD.dtype)


_ANY = Orders(lambda p: 0 < p < math.inf, "finite p > 0")
_INTEGERS = Orders(lambda p: p >= 1 and p % 1 == 0, "p = 1, 2, 3, ...")
_POWERS_OF_TWO = Orders(lambda p: p >= 2 and math.log2(p) % 1 == 0, "p = 2, 4, 8, ...")

# (a_BxDxD, p, eps, *, relative, basis) -> Root of A + eps I, or with `relative` of A + eps λmax I.
# float32 or float64.
ROOTS: dict[str, RootMethod] = {
  "eigh": RootMethod(_eigh, False, _ANY),
  "newton": RootMethod(_newton, False, _INTEGERS),
  "denman_beavers": RootMethod(_denman_beavers, False, _POWERS_OF_TWO),
  "qr": RootMethod(_qr, True, _ANY),
}
