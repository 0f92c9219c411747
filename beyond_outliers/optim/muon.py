"""Muon: the averaged gradient, orthogonalised, so that all its singular directions move equally.

Jordan 2024, kellerjordan.github.io/posts/muon.

Legend: B blocks in a stack, M rows and N columns of a block, M <= N.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from beyond_outliers.config import optimizers
from beyond_outliers.config.hyperparameters import at_least, is_number, official
from beyond_outliers.optim import blocks, blockwise, factory
from beyond_outliers.optim.adamw import adamw
from beyond_outliers.optim.axes import AxesTree, Leaf, by_kind
from beyond_outliers.optim.linalg import newton_schulz


@dataclasses.dataclass(frozen=True)
class _Muon(optimizers.Muon):
  """Hyperparameters of Muon, including those that no configuration sets."""

  ns_eps: float = official(
    1e-7, "added to the Frobenius norm; torch has 0 for norms above 1e-7, optax 1e-8", at_least(0)
  )


class BlocksState(NamedTuple):
  mu: jax.Array | tuple[()]  # [B, M, N] average of gradients; () without momentum


def original(leaf: Leaf) -> float:
  return math.sqrt(max(1, leaf.fan_out / leaf.fan_in))


def match_rms_adamw(leaf: Leaf) -> float:
  """Scale that matches AdamW's update RMS: arXiv 2502.16982, equation 4."""
  return 0.2 * math.sqrt(max(leaf.fan_out, leaf.fan_in))


# Factors by which an orthogonalised matrix is multiplied.
UPDATE_SCALES: dict[str, Callable[[Leaf], float]] = {
  "original": original,
  "match_rms_adamw": match_rms_adamw,
}


@factory.arguments_of(
  _Muon,
  without=("learning_rate", "weight_decay", "adam_learning_rate", "adam_b1", "adam_b2", "adam_eps"),
)
def scale_by_muon(
  h: _Muon, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Muon's direction for matrices, to be subtracted.

  scale may also be a function of the matrix's `Leaf`.
  Errors: ValueError, at init, for a leaf that isn't made of matrices by its `axes`."""
  return _direction(h, axes, mesh)


@factory.arguments_of(_Muon)
def muon(
  h: _Muon, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Muon for leaves that are matrices, AdamW for the others, and one decoupled decay for all.

  Follows KellerJordan/Muon's SingleDeviceMuonWithAuxAdam (857d1ad).

  An average is kept unless momentum is the Python number 0. The scale does not apply to the decay
  (as in torch.optim._Muon). ns_dtype None: the state's type.
  State in float32: 4 bytes per element of a matrix, 8 per element of the others."""
  return by_kind(
    axes,
    matrix=optax.chain(
      _direction(h, axes, mesh),
      optax.add_decayed_weights(h.weight_decay),
      optax.scale_by_learning_rate(h.learning_rate),
    ),
    other=adamw(
      h.adam_learning_rate, b1=h.adam_b1, b2=h.adam_b2, eps=h.adam_eps, weight_decay=h.weight_decay
    ),
  )


def has_average(momentum: float) -> bool:
  """Whether gradients are averaged at all; assumed so for a momentum that is traced."""
  return not is_number(momentum) or momentum > 0


def _direction(
  h: _Muon, axes: AxesTree, mesh: jax.sharding.Mesh | None
) -> optax.GradientTransformation:
  try:
    newton_schulz.coefficients(h.ns_coefficients, h.ns_steps)
  except ValueError as error:
    raise ValueError(f"ns_coefficients, ns_steps: {error}") from None
  scale = UPDATE_SCALES[h.scale] if isinstance(h.scale, str) else h.scale
  return blockwise.transformation(
    h,
    functools.partial(_matrices, axes=axes, mesh=mesh),
    _init_bucket,
    _step,
    traced=("momentum", "ns_eps"),
    constants=lambda layout: layout.per_block(scale),
  )


def _matrices(tree: Any, axes: AxesTree, mesh: jax.sharding.Mesh | None) -> blocks.Layout:
  """Layout in which each matrix is one block."""
  layout = blocks.layout(tree, axes, mesh=mesh)
  for leaf in layout.leaves:
    if not leaf.is_matrix:
      raise ValueError(
        f"axes: parameter {leaf.path!r} of shape {leaf.shape} is not a matrix and cannot be "
        "orthogonalised; name its fan_in and fan_out, or leave it to another optimizer, as `muon` "
        "does"
      )
  return layout


def _init_bucket(h: _Muon, bucket: blocks.Bucket, dtype: np.dtype) -> BlocksState:
  return BlocksState(bucket.zeros(*bucket.shape, dtype=dtype) if has_average(h.momentum) else ())


def _step(
  h: _Muon, count: jax.Array, g_BxMxN: jax.Array, state: BlocksState, scale_B: jax.Array
) -> tuple[jax.Array, BlocksState]:
  x_BxMxN = g_BxMxN
  if isinstance(state.mu, jax.Array):
    state = BlocksState(h.momentum * state.mu + (1 - h.momentum) * g_BxMxN)
    of_average, of_latest = _weights(h, count)
    x_BxMxN = of_average * state.mu + of_latest * g_BxMxN
  x_BxMxN = newton_schulz.orthogonalize(
    x_BxMxN,
    steps=h.ns_steps,
    table=h.ns_coefficients,
    dtype=h.ns_dtype,
    gram=h.ns_gram,
    eps=h.ns_eps,
  )
  return scale_B[:, None, None] * x_BxMxN, state


def _weights(h: _Muon, count: jax.Array) -> tuple[Any, Any]:
  """Weights of the gradients' average and of the latest gradient in the sum to be orthogonalised.

  The scale of that sum does not matter: orthogonalisation removes it."""
  if not h.nesterov:
    return 1, 0
  if not h.nesterov_bias_correction:
    return h.momentum, 1 - h.momentum
  # optax corrects the average's bias as if it held one gradient more.
  return h.momentum / (1 - h.momentum ** (count + 1)), (1 - h.momentum) / (1 - h.momentum**count)
