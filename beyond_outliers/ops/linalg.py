"""Decompositions and triangular solves of stacks of matrices: the only calls of LAPACK's kernels.

On CPU each matrix gets a call of its own. XLA's CPU backend (jaxlib 0.10.2) distributes the
matrices of one call over the threads that also wait for the result: two concurrent calls, for two
buckets or on two devices of a process, deadlock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def eigh(a_BxDxD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(eigenvalues [B, D], ascending; eigenvectors [B, D, D], as columns) of symmetric matrices, of
  which only the lower triangle is read."""
  return map_matrices(lambda a: tuple(jnp.linalg.eigh(a, symmetrize_input=False)), a_BxDxD)


def qr(a_BxDxD: jax.Array) -> jax.Array:
  """The orthogonal factors of QR decompositions, [B, D, D]."""
  return map_matrices(lambda a: jnp.linalg.qr(a)[0], a_BxDxD)


def cholesky(a_BxDxD: jax.Array) -> jax.Array:
  """The lower triangular Cholesky factors, [B, D, D]; NaN for matrices not positive definite."""
  return map_matrices(jnp.linalg.cholesky, a_BxDxD)


def solve_triangular(r_BxDxD: jax.Array, b: jax.Array, **how: bool) -> jax.Array:
  """Solution X of a triangular system. how: keywords of jax.lax.linalg.triangular_solve."""
  return map_matrices(lambda r, b: jax.lax.linalg.triangular_solve(r, b, **how), r_BxDxD, b)


def map_matrices(kernel: Callable[..., Any], *stacks: jax.Array) -> Any:
  """kernel(*stacks), for a kernel that takes matrices as well as stacks; on CPU matrix by matrix,
  so that each stays in the cache."""
  return jax.lax.platform_dependent(
    *stacks, cpu=lambda *stacks: jax.lax.map(lambda one: kernel(*one), stacks), default=kernel
  )
