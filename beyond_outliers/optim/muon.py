"""Muon: all singular directions of an averaged gradient move a matrix alike (Jordan 2024,
kellerjordan.github.io/posts/muon).

Legend: B blocks in a stack, M rows and N columns of a block, M <= N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.optim import blocks, factory
from beyond_outliers.optim.adamw import adamw
from beyond_outliers.optim.axes import AxesTree, Leaf, by_kind
from beyond_outliers.optim.linalg import newton_schulz

# What an orthogonalised matrix is multiplied by.
SCALES: dict[str, Callable[[Leaf], float]] = {
  "original": lambda leaf: math.sqrt(max(1, leaf.fan_out / leaf.fan_in)),
  "match_rms_adamw": lambda leaf: (
    0.2 * math.sqrt(max(leaf.fan_out, leaf.fan_in))
  ),  # arXiv 2502.16982, equation 4
}


class BlocksState(NamedTuple):
  mu: jax.Array | tuple[()]  # [B, M, N] average of gradients; () without momentum


class ScaleByMuonState(NamedTuple):
  count: jax.Array  # int32: updates done
  blocks: dict[str, BlocksState]


def scale_by_muon(
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  ns_coefficients: newton_schulz.Table = "quintic",
  ns_dtype: str | None = "bfloat16",
  ns_gram: bool = False,
  ns_eps: float = 1e-7,
  scale: str | Callable[[Leaf], float] = "original",
  nesterov_bias_correction: bool = False,
) -> optax.GradientTransformation:
  """Muon's direction for matrices, to be subtracted; `muon` has the arguments' meaning.

  scale: also a function of the leaf that a matrix belongs to. A momentum of the Python number 0
    keeps no average.
  Errors: ValueError, at init, for a leaf that `axes` don't make a matrix."""
  if isinstance(scale, str):
    factory.one_of("scale", scale, SCALES)
    scale = SCALES[scale]
  if ns_dtype is not None:
    factory.one_of("ns_dtype", ns_dtype, newton_schulz.DTYPES)
  try:
    newton_schulz.coefficients(ns_coefficients, ns_steps)
  except ValueError as error:
    raise ValueError(f"ns_coefficients, ns_steps: {error}") from None
  averages = has_average(momentum)

  def layout_of(tree: Any) -> blocks.Layout:
    layout = blocks.layout(tree, axes, mesh=mesh)
    for leaf in layout.leaves:
      if not leaf.is_matrix:
        raise ValueError(
          f"axes: parameter {leaf.path!r} of shape {leaf.shape} is no matrix and cannot be "
          "orthogonalised; "
          "name its fan_in and fan_out, or leave it to another optimizer, as `muon` does"
        )
    return layout

  def init(params):
    layout = layout_of(params)
    buckets = {
      name: BlocksState(zeros if averages else ()) for name, zeros in layout.zeros().items()
    }
    return ScaleByMuonState(jnp.zeros((), jnp.int32), buckets)

  def update(updates, state, params=None):
    del params
    layout, count = layout_of(updates), state.count + 1
    scales = layout.constants(scale)
    tree = {
      name: (g, state.blocks[name], scales[name]) for name, g in layout.stack(updates).items()
    }
    done = layout.local(step)(
      tree, (*(jnp.asarray(x, layout.dtype) for x in (momentum, ns_eps)), count)
    )
    directions = {name: direction for name, (direction, _) in done.items()}
    return layout.unstack(directions, updates), ScaleByMuonState(
      count, {name: new for name, (_, new) in done.items()}
    )

  def step(tree, common):
    return {name: one_bucket(*of_bucket, *common) for name, of_bucket in tree.items()}

  def one_bucket(g_BxMxN, state, scale_B, decay, eps, count):
    x_BxMxN = g_BxMxN
    if averages:
      state = BlocksState(decay * state.mu + (1 - decay) * g_BxMxN)
      of_average, of_latest = _weights(decay, count, nesterov, nesterov_bias_correction)
      x_BxMxN = of_average * state.mu + of_latest * g_BxMxN
    x_BxMxN = newton_schulz.orthogonalize(
      x_BxMxN, steps=ns_steps, table=ns_coefficients, dtype=ns_dtype, gram=ns_gram, eps=eps
    )
    return scale_B[:, None, None] * x_BxMxN, state

  return optax.GradientTransformation(init, update)


@factory.static_integers
def muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  ns_coefficients: newton_schulz.Table = "quintic",
  ns_dtype: str | None = "bfloat16",
  ns_gram: bool = False,
  ns_eps: float = 1e-7,
  scale: str = "original",
  nesterov_bias_correction: bool = False,
  weight_decay: float = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule = 3e-4,
  adam_b1: float = 0.9,
  adam_b2: float = 0.95,
  adam_eps: float = 1e-10,
) -> optax.GradientTransformation:
  """Muon for the leaves that are matrices, AdamW for the others, one decoupled decay for all:
  KellerJordan/Muon's SingleDeviceMuonWithAuxAdam (857d1ad).

  momentum, nesterov: decay of the average of gradients, not bias-corrected; whether the latest
    gradient is mixed in once more.
  ns_steps, ns_coefficients, ns_dtype, ns_gram, ns_eps: as steps, table, dtype, gram and eps of
    newton_schulz.orthogonalize; dtype None: that of the state. torch.optim.Muon has eps 0 for any
    matrix whose norm is above 1e-7, optax 1e-8.
  scale: "original", sqrt(max(1, fan_out / fan_in)), or "match_rms_adamw", 0.2 sqrt(max(fan_out,
    fan_in)): AdamW's update RMS, so that its learning rates can be used; not applied to the decay
    (torch.optim.Muon).
  nesterov_bias_correction: True: average and gradient are each corrected before they are mixed, as
    optax.contrib.muon does.
  adam_...: of the leaves that are not matrices.

  State: 4 bytes a number of a matrix in float32, 8 of others."""
  direction = scale_by_muon(
    axes=axes,
    mesh=mesh,
    momentum=momentum,
    nesterov=nesterov,
    ns_steps=ns_steps,
    ns_coefficients=ns_coefficients,
    ns_dtype=ns_dtype,
    ns_gram=ns_gram,
    ns_eps=ns_eps,
    scale=scale,
    nesterov_bias_correction=nesterov_bias_correction,
  )
  decay_and_step = (
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  return by_kind(
    axes,
    matrix=optax.chain(direction, *decay_and_step),
    other=adamw(
      adam_learning_rate, b1=adam_b1, b2=adam_b2, eps=adam_eps, weight_decay=weight_decay
    ),
  )


def has_average(momentum: float) -> bool:
  """Whether gradients are averaged at all; known only of Python's numbers, not of a momentum that
  is traced.

  Errors: ValueError outside [0, 1)."""
  if not isinstance(momentum, (int, float)):
    return True
  if not 0 <= momentum < 1:
    raise ValueError(
      f"momentum = {momentum}: expected the average's decay, from 0 to below 1; implementations "
      "that take the "
      "new gradient's weight call one minus it momentum"
    )
  return momentum > 0


def _weights(
  decay: jax.Array, count: jax.Array, nesterov: bool, corrected: bool
) -> tuple[Any, Any]:
  """Of the average of gradients and of the latest one in what is orthogonalised: the length of
  their sum is of no account."""
  if not nesterov:
    return 1, 0
  if not corrected:
    return decay, 1 - decay
  # The average is corrected as if it held one gradient more.
  return decay / (1 - decay ** (count + 1)), (1 - decay) / (1 - decay**count)
