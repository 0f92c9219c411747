"""Rounders, from a matrix to codes: round to nearest, and GPTQ.

GPTQ rounds so as to change the product with known inputs little.

Legend: K contraction, O outputs; w is [K, O] in the basis that is quantized, and so is the Gram
matrix of its inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops import linalg
from beyond_outliers.quant import quantizers
from beyond_outliers.quant.quantizers import Quantized
from beyond_outliers.quant.spec import QuantSpec

ROWS_A_BLOCK = 128  # rows between two updates of all later rows: affects only speed
DAMPING = 0.01  # the official default


def round_to_nearest(
  w_KxO: jax.Array, scale: jax.Array, spec: QuantSpec, gram_KxK: Any, damping: float = DAMPING
) -> Quantized:
  """Rounds every weight to its nearest level."""
  del gram_KxK, damping
  return quantizers.forward(w_KxO, scale, spec)[0]


def gptq(
  w_KxO: jax.Array,
  scale: jax.Array,
  spec: QuantSpec,
  gram_KxK: jax.Array,
  damping: float = DAMPING,
  *,
  by_importance: bool = True,
) -> Quantized:
  """GPTQ: rounds row after row to the nearest level; later rows compensate each row's error.

  arXiv 2210.17323, algorithm 1.

  gram: XᵀX of the inputs, times any constant.
  damping: fraction of the Gram matrix's mean diagonal that is added to the diagonal.
  by_importance: rows with the largest inputs first (the official `act_order`), else in order.
  The scales stay as they are (the official `static_groups`), so they don't depend on the order. The
  row of an input that is always zero is rounded on its own. If the damped matrix has no Cholesky
  factor, or errors overflow, scales become NaN, since codes cannot show it (fallback.py)."""
  order = jnp.argsort(-jnp.diag(gram_KxK)) if by_importance else jnp.arange(len(w_KxO))
  scale_KxO = jnp.broadcast_to(quantizers.spread(scale, w_KxO.shape), w_KxO.shape)
  u_KxK = _propagation(gram_KxK[order][:, order], damping)
  rest_KxO, codes = _row_after_row(w_KxO[order], scale_KxO[order], u_KxK, spec)
  scale = jnp.where(jnp.isfinite(u_KxK).all() & jnp.isfinite(rest_KxO).all(), scale, jnp.nan)
  return Quantized(codes[jnp.argsort(order)], scale)


def _propagation(gram_KxK: jax.Array, damping: float) -> jax.Array:
  """U, upper triangular, with UᵀU the inverse of the damped Gram matrix: it propagates a row's
  error to the rows after it."""
  diagonal = jnp.diag(gram_KxK)
  added = damping * jnp.mean(diagonal) + jnp.where(diagonal == 0, 1, 0)
  damped = gram_KxK + jnp.diag(added)
  # A Cholesky factorization from the other end, V Vᵀ with V upper triangular; then U = V⁻¹.
  upper_1xKxK = linalg.cholesky(damped[None, ::-1, ::-1])[:, ::-1, ::-1]
  one_1xKxK = jnp.eye(len(gram_KxK), dtype=gram_KxK.dtype)[None]
  return linalg.solve_triangular(upper_1xKxK, one_1xKxK, left_side=True, lower=False)[0]


def _row_after_row(w_KxO, scale_KxO, u_KxK, spec):
  """(the matrix with the blocks' corrections, not finite where an error was not; its codes)."""
  K = len(w_KxO)
  size = min(ROWS_A_BLOCK, K)
  padding = -K % size
  w_KxO, scale_KxO = (jnp.pad(x, ((0, padding), (0, 0))) for x in (w_KxO, scale_KxO))
  beyond_K = jnp.where(jnp.arange(K + padding) < K, 0, 1).astype(u_KxK.dtype)
  u_KxK = jnp.pad(u_KxK, (0, padding)) + jnp.diag(beyond_K)

  def of_block(number, carry):
    w_KxO, codes_KxO = carry
    start = number * size
    u_BxB = lax.dynamic_slice(u_KxK, (start, start), (size, size))
    scale_BxO = lax.dynamic_slice_in_dim(scale_KxO, start, size)

    def of_row(row, carry):
      w_BxO, codes_BxO, errors_BxO = carry
      codes, _ = quantizers.encode(
        quantizers.in_units(w_BxO[row], scale_BxO[row], spec), spec, None
      )
      error = (w_BxO[row] - codes.astype(scale_BxO.dtype) * scale_BxO[row]) / u_BxB[row, row]
      later = jnp.where(jnp.arange(size) > row, u_BxB[row], 0)
      return (
        w_BxO - later[:, None] * error,
        codes_BxO.at[row].set(codes),
        errors_BxO.at[row].set(error),
      )

    w_BxO = lax.dynamic_slice_in_dim(w_KxO, start, size)
    nothing = jnp.zeros(w_BxO.shape, spec.levels.dtype), jnp.zeros_like(w_BxO)
    _, codes_BxO, errors_BxO = lax.fori_loop(0, size, of_row, (w_BxO, *nothing))
    rows_BxK = lax.dynamic_slice_in_dim(u_KxK, start, size)
    rest_BxK = jnp.where(jnp.arange(K + padding) >= start + size, rows_BxK, 0)
    w_KxO = w_KxO - jnp.matmul(rest_BxK.T, errors_BxO, precision=lax.Precision.HIGHEST)
    return w_KxO, lax.dynamic_update_slice_in_dim(codes_KxO, codes_BxO, start, 0)

  codes = jnp.zeros(w_KxO.shape, spec.levels.dtype)
  w_KxO, codes = lax.fori_loop(0, (K + padding) // size, of_block, (w_KxO, codes))
  return w_KxO, codes[:K]


class Rounder(NamedTuple):
  """A rule from a matrix to its codes, and what it needs.

  round: (w [K, O], scale, spec, Gram matrix or None, damping) -> Quantized.
  needs_gram: whether it reads the inputs' Gram matrix, so that its methods need calibration.
  options: the fields of Method that it reads; a method's name may set them."""

  round: Callable[..., Quantized]
  needs_gram: bool = False
  options: tuple[str, ...] = ()


_gptq_in_order = functools.partial(gptq, by_importance=False)

ROUNDERS: dict[str, Rounder] = {
  "nearest": Rounder(round_to_nearest),
  "gptq": Rounder(gptq, needs_gram=True, options=("damping",)),
  "gptq_in_order": Rounder(_gptq_in_order, needs_gram=True, options=("damping",)),
}
