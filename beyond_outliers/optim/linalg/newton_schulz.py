"""Newton-Schulz iteration: orthogonalises matrices approximately by matrix products alone; odd
polynomials send each singular value near one.

Legend: B matrices in a stack, M rows, N columns; S steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from beyond_outliers.ops.extremes import max_magnitude
from beyond_outliers.optim import factory

Triple = tuple[float, float, float]  # (a, b, c) of x -> a x + b x³ + c x⁵
Table = str | Sequence[Triple]  # a row of COEFFICIENTS, or one polynomial per step
Segment = tuple[Triple, ...]  # steps from one computation of X Xᵀ to the next

DTYPES = ("bfloat16", "float32", "float64")

# The eps in the divisor is at most this fraction of the norm.
EPS_CAP = 1e-5

# Rounding errors of a Gram matrix grow by a² per step; it is recomputed before they reach this.
GRAM_ERROR = 2e-3

# From this many rows on, a symmetric product is faster in halves on CPU.
HALVED_ROWS = 256


def _shrunk(triple: Triple, factor: float) -> Triple:
  """The polynomial of x / factor."""
  return triple[0] / factor, triple[1] / factor**3, triple[2] / factor**5


_POLAR_EXPRESS: tuple[Triple, ...] = (
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
  (1.875, -1.25, 0.375),
)

# The polynomial of each step; the last one serves all further steps.
#   quintic: Jordan 2024, kellerjordan.github.io/posts/muon; singular values end up in about
#     [0.68, 1.13].
#   polar_express: arXiv 2505.16932, algorithm 1. Its safety factor of 1.01 divides the argument of
#     every polynomial but the last; that of the first twice, because algorithm 1 also multiplies
#     the norm by it.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
  "quintic": ((3.4445, -4.7750, 2.0315),),
  "polar_express": (
    _shrunk(_POLAR_EXPRESS[0], 1.01**2),
    *(_shrunk(triple, 1.01) for triple in _POLAR_EXPRESS[1:-1]),
    _POLAR_EXPRESS[-1],
  ),
}


def coefficients(table: Table, steps: int) -> tuple[Triple, ...]:
  """The polynomial of each of `steps` steps: the table's, cut short or with the last one repeated.

  Errors: ValueError for less than one step, an unknown name, or a table that isn't a sequence of
    triples of finite numbers."""
  if steps < 1:
    raise ValueError(f"steps = {steps}: expected at least 1")
  if isinstance(table, str):
    factory.check_choice("table", table, COEFFICIENTS)
    rows = COEFFICIENTS[table]
  else:
    try:
      rows = tuple((float(a), float(b), float(c)) for a, b, c in table)
    except (TypeError, ValueError):
      rows = ()
    if not rows or not np.isfinite(rows).all():
      raise ValueError(
        f"table = {table!r}: expected a name or a sequence of triples of finite numbers, "
        "((a, b, c), ...), for a x + b x^3 + c x^5"
      )
  return (rows + rows[-1:] * steps)[:steps]


def orthogonalize(
  x_BxMxN: jax.Array,
  *,
  steps: int = 5,
  table: Table = "quintic",
  dtype: str | None = None,
  gram: bool = False,
  eps: float = 1e-7,
) -> jax.Array:
  """Each matrix with its singular vectors kept and its singular values sent near one: the step of
  Muon and Scion.

  [B, M, N], in the dtype of x. A step is X <- (a I + b A + c A²) X with A = X Xᵀ on the short side:
  that of KellerJordan/Muon, with a X moved into the product.
  steps, table: the polynomials, as in `coefficients`.
  dtype: of the operands, "bfloat16" | "float32" | "float64" | None (that of x). Sums, norms and
    polynomials are in float32 at least: the official bfloat16 code rounds each of them, and its
    errors are about 1.6 times ours.
  eps: added to the Frobenius norm, as officially, but never more than 1e-5 of it: tiny matrices are
    orthogonalised like any other. With 0 the divisor is the norm, as in torch.optim.Muon for norms
    above 1e-7. Zero matrices stay zero.
  gram: iterate on A alone, A <- P A P for each step's polynomial P, and multiply X by the product
    of the P: five steps in float32 take 26 instead of 35 products of M x M x M at N = 3 M, 46
    instead of 85 at 8 M, but 18 instead of 15 at M. Rounding errors of A grow by a² per step, so A
    is recomputed from X before they reach 2e-3: in float32 after three steps, in float64 not within
    ten, in bfloat16 after each, which is the plain iteration. How much gram changes the result of
    five steps, in the spectral norm: the largest change over 16 to 256 rows and N / M = 1, 3 and 8,
    which do not differ; in brackets, the change by float32 alone, without gram:
      condition of X             1e2               1e4               1e6
      float32, quintic           1e-5 (1e-5)       2e-5 (2e-5)       2e-5 (2e-5)
      float32, polar_express     4e-5 (1e-5)       1e-4 (3e-5)       2e-4 (3e-5)
      float64, quintic           1e-12             3e-12             5e-12
      float64, polar_express     7e-12             1e-10             4e-11

  On CPU one matrix is processed after another, so that each stays in the cache: call this on a
  device's own share of the stack (shard_map), or the compiler gathers a stack that is split.
  Elsewhere each product is batched over the whole stack.
  Errors: ValueError for anything but a stack of matrices, for an unknown dtype, and those of
    `coefficients`."""
  if x_BxMxN.ndim != 3:
    raise ValueError(
      f"x of shape {x_BxMxN.shape}: expected a stack of matrices [B, M, N]; reshape, or add an axis"
    )
  if dtype is not None:
    factory.check_choice("dtype", dtype, DTYPES)
  operands = jax.dtypes.canonicalize_dtype(dtype or x_BxMxN.dtype)
  segments = _segments(coefficients(table, steps), operands, gram)
  if x_BxMxN.shape[1] > x_BxMxN.shape[2]:
    # Transposed outside the loop over matrices: inside, XLA would fold the transposes into
    # products, some of which its CPU library lacks in bfloat16.
    return _orthogonalize(x_BxMxN.mT, eps, segments, operands).mT
  return _orthogonalize(x_BxMxN, eps, segments, operands)


def _segments(triples: tuple[Triple, ...], dtype: jnp.dtype, gram: bool) -> tuple[Segment, ...]:
  """Steps in segments: with gram as long as rounding errors allow, without it of one step each."""
  segments: list[Segment] = []
  for triple in triples:
    longer = (*segments[-1], triple) if segments else ()
    if (
      gram and longer and jnp.finfo(dtype).eps * math.prod(a * a for a, _, _ in longer) < GRAM_ERROR
    ):
      segments[-1] = longer
    else:
      segments.append((triple,))
  return tuple(segments)


@functools.partial(jax.jit, static_argnames=("segments", "dtype"))
def _orthogonalize(
  x_BxMxN: jax.Array, eps: jax.Array, segments: tuple[Segment, ...], dtype: jnp.dtype
) -> jax.Array:
  return lax.platform_dependent(
    x_BxMxN,
    eps,
    cpu=lambda x_BxMxN, eps: lax.map(
      lambda x_MxN: _iterate(x_MxN, eps, segments, dtype, _symmetric_product), x_BxMxN
    ),
    default=lambda x_BxMxN, eps: _iterate(x_BxMxN, eps, segments, dtype, _product_with_transpose),
  )


def _iterate(
  x: jax.Array,
  eps: jax.Array,
  segments: tuple[Segment, ...],
  dtype: jnp.dtype,
  symmetric: Callable[[jax.Array, jax.Array, jnp.dtype], jax.Array],
) -> jax.Array:
  """The iteration on x: [M, N] or [B, M, N], M <= N.

  symmetric(y, z, dtype): a symmetric y zᵀ, as of y and z that are polynomials of one matrix."""
  wide = jnp.promote_types(dtype, jnp.float32)

  def polynomial(r, triple):
    a, b, c = triple
    return a * jnp.eye(r.shape[-1], dtype=wide) + b * r + c * symmetric(r, r, dtype)

  def advance(y, segment_Sx3):
    r = symmetric(y, y, dtype)
    q = p = polynomial(r, segment_Sx3[0])
    for triple in segment_Sx3[1:]:
      r = symmetric(p, symmetric(p, r, dtype), dtype)  # p r p: p p r loses more to rounding
      p = polynomial(r, triple)
      q = symmetric(p, q, dtype)
    return _product("...mk,...kn->...mn", q, y, dtype), None

  y = _normalized(x.astype(jnp.promote_types(x.dtype, wide)), eps).astype(wide)
  for _, alike in itertools.groupby(segments, len):
    y, _ = lax.scan(advance, y, np.asarray(list(alike), wide))
  return y.astype(x.dtype)


def _normalized(x: jax.Array, eps: jax.Array) -> jax.Array:
  """Matrices divided by their Frobenius norm, even where squares would overflow or underflow."""
  largest = max_magnitude(x, (-2, -1), keepdims=True)
  largest = jnp.where(largest > 0, largest, 1)
  x = x / largest
  norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
  norm = jnp.where(norm > 0, norm, 1)
  return x / (norm + jnp.minimum(eps / largest, EPS_CAP * norm))


def _product(subscripts: str, y: jax.Array, z: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Product summed in float32 at least. XLA's CPU library is fast in bfloat16 if the sum is over
  the last axis of the first operand."""
  wide = jnp.promote_types(dtype, jnp.float32)
  # By default TPUs multiply float32 in bfloat16 passes, and recent GPUs in TF32.
  precision = lax.Precision.HIGHEST if wide == dtype else None
  return jnp.einsum(
    subscripts, y.astype(dtype), z.astype(dtype), precision=precision, preferred_element_type=wide
  )


def _product_with_transpose(y: jax.Array, z: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return _product("...mk,...nk->...mn", y, z, dtype)


def _symmetric_product(y_MxN: jax.Array, z_MxN: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """A symmetric y zᵀ, of which one off-diagonal quarter is the other's transpose, recursively: 5/8
  of the FLOPs at 768 rows."""
  rows = y_MxN.shape[0]
  if rows < HALVED_ROWS:
    return _product_with_transpose(y_MxN, z_MxN, dtype)
  upper, lower = slice(rows // 2), slice(rows // 2, rows)
  corner = _product_with_transpose(y_MxN[lower], z_MxN[upper], dtype)
  return jnp.block(
    [
      [_symmetric_product(y_MxN[upper], z_MxN[upper], dtype), corner.T],
      [corner, _symmetric_product(y_MxN[lower], z_MxN[lower], dtype)],
    ]
  )
