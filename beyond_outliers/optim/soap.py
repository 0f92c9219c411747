"""SOAP (arXiv 2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's factors, a basis that
is renewed every few steps.

The first moment is kept in the basis and rotated when the basis changes. Algorithm 3 keeps it in
the original coordinates and rotates it at every step, which is equivalent.

Legend: B blocks on this device, D the axis of a basis, A rotated axes of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.config.optimizers import Soap
from beyond_outliers.ops import linalg
from beyond_outliers.optim import blocks, blockwise, factory
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.eigenbasis import (
  Arrays,
  BlocksState,
  accumulate_factors,
  change_bases,
  first_state,
  grown_older,
  rotate_block,
)
from beyond_outliers.optim.linalg import packing
from beyond_outliers.optim.linalg.inverse_root import orthogonal_iteration
from beyond_outliers.optim.linalg.kronecker import Scalar, broadcast_blocks
from beyond_outliers.optim.refresh import staggered, together


@factory.arguments_of(Soap, without=("learning_rate", "weight_decay"))
def scale_by_soap(
  h: Soap, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """SOAP's direction, to be subtracted."""
  return _direction(h, axes, mesh)


@factory.arguments_of(Soap)
def soap(
  h: Soap, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """SOAP, following its authors' code (nikhilvyas/SOAP, a1e5535).

  The first update only finds the bases; parameters do not move.

  State, bytes per element of an m x n block in float32: 8 + 8 (m² + n²) / mn; an axis that is not
  rotated has no such term. preconditioner_dtype="bfloat16" halves the last term."""
  return optax.chain(
    _direction(h, axes, mesh),
    optax.scale_by_learning_rate(h.learning_rate),
    _decay_afterwards(h.learning_rate, h.weight_decay),
  )


class SoapClock(NamedTuple):
  first: jax.Array  # bool: whether this update only initialises
  step: jax.Array  # int32: the step number that bias correction and refreshes of bases use


def _direction(
  h: Soap, axes: AxesTree, mesh: jax.sharding.Mesh | None
) -> optax.GradientTransformation:
  if h.shampoo_beta is None:
    h = dataclasses.replace(h, shampoo_beta=h.b2)
  return blockwise.transformation(
    h,
    functools.partial(blocks.layout, axes=axes, mesh=mesh, block_size=h.block_size),
    _init_bucket,
    _step,
    traced=("b1", "b2", "shampoo_beta", "eps"),
    constants=blocks.Layout.block_ids,
    advance=functools.partial(_advance, h),
    finish=_finish,
  )


def _rotated_axes(h: Soap, shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(axis for axis, d in enumerate(shape) if len(shape) == 2 and d <= h.max_dim)


def _init_bucket(h: Soap, bucket: blocks.Bucket, dtype: np.dtype) -> BlocksState:
  s = first_state(bucket, _rotated_axes(h, bucket.shape), dtype)
  return _in_dtype(s, packing.stored_dtype(h.preconditioner_dtype, dtype))


def _in_dtype(s: BlocksState, dtype: Any) -> BlocksState:
  """The state with factors and bases of this type."""
  factors, bases = (tuple(a.astype(dtype) for a in arrays) for arrays in (s.factors, s.bases))
  return s._replace(factors=factors, bases=bases)


def _advance(h: Soap, state: blockwise.State) -> tuple[blockwise.State, SoapClock]:
  count = state.count + 1
  step = count if h.count_skipped_step else state.count
  return state._replace(count=count), SoapClock(count == 1, step)


def _step(
  h: Soap, clock: SoapClock, g: jax.Array, s: BlocksState, id_B: jax.Array
) -> tuple[jax.Array, BlocksState]:
  """Takes Adam's direction in the bases, then improves the bases."""
  axes = _rotated_axes(h, g.shape[1:])
  stored = s.bases[0].dtype if axes else g.dtype
  s = _in_dtype(s, g.dtype)
  seen = rotate_block(g, s.bases, axes)
  momentum = _average(clock, h.b1, s.momentum, seen)
  second_moment = _average(clock, h.b2, s.second_moment, seen * seen)
  adam = momentum / (jnp.sqrt(second_moment) + h.eps)
  direction = rotate_block(adam, s.bases, axes, back=True)

  assert h.shampoo_beta is not None
  factors = accumulate_factors(s.factors, g, axes, h.shampoo_beta, 1 - h.shampoo_beta)
  s = s._replace(momentum=momentum, second_moment=second_moment, factors=())
  if axes:
    s = _refresh_bases(h, clock, axes, s, factors, id_B)
  return direction, _in_dtype(s._replace(factors=factors), stored)


def _average(clock: SoapClock, decay: Scalar, mean: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.where(clock.first, mean, decay * mean + (1 - decay) * x)


def _refresh_bases(
  h: Soap, clock: SoapClock, axes: tuple[int, ...], s: BlocksState, factors: Arrays, id_B: jax.Array
) -> BlocksState:
  improve = functools.partial(_improve_bases, axes=axes)

  def later(s: BlocksState, factors: Arrays) -> BlocksState:
    if h.refresh == "staggered":
      return staggered(s, id_B, clock.step, h.precondition_frequency, improve, factors)
    return together(s, clock.step % h.precondition_frequency == 0, improve, factors)

  first = functools.partial(_first_bases, axes=axes)
  return jax.lax.cond(clock.first, first, later, grown_older(s), factors)


def _first_bases(s: BlocksState, factors: Arrays, axes: tuple[int, ...]) -> BlocksState:
  """The first bases: eigenvectors by descending eigenvalue. The moments are still zero."""
  bases = []
  for factor in factors:
    ridge = 1e-30 * jnp.eye(factor.shape[-1], dtype=factor.dtype)
    bases.append(linalg.eigh(factor + ridge)[1][:, :, ::-1])
  return change_bases(s, tuple(bases), axes)[0]


def _improve_bases(s: BlocksState, factors: Arrays, axes: tuple[int, ...]) -> BlocksState:
  """Bases after one more orthogonal iteration.

  The second moment is not rotated, only permuted as the eigenvalues are sorted."""
  bases, _, orders = zip(*map(orthogonal_iteration, factors, s.bases), strict=True)
  s, ok_BxA = change_bases(s, bases, axes)
  for i, axis in enumerate(axes):
    order_BxD = jnp.where(ok_BxA[:, i : i + 1], orders[i], jnp.arange(orders[i].shape[1]))
    along_axis = jnp.expand_dims(order_BxD, 2 - axis)
    s = s._replace(second_moment=jnp.take_along_axis(s.second_moment, along_axis, axis + 1))
  return s


def _finish(
  h: Soap, clock: SoapClock, layout: blocks.Layout, done: dict[str, Any]
) -> tuple[blockwise.ByBucket, blockwise.ByBucket]:
  """Directions, normalized and bias-corrected where `h` says so; zero at the first update."""
  directions, states = blockwise.directions_and_states(done)
  if h.normalize_gradients:
    directions = _normalize(layout, directions)
  scale = jnp.ones((), layout.dtype)
  if h.bias_correction:
    scale = jnp.sqrt(1 - h.b2**clock.step) / (1 - h.b1**clock.step)
  return {name: jnp.where(clock.first, 0, scale * d) for name, d in directions.items()}, states


def _normalize(layout: blocks.Layout, directions: blockwise.ByBucket) -> blockwise.ByBucket:
  """Directions divided by the RMS of their slice, which may span several blocks."""
  squares = layout.sum_over_slices(
    {name: jnp.sum(d * d, tuple(range(1, d.ndim))) for name, d in directions.items()}
  )
  sizes, normalized = layout.per_block(lambda leaf: math.prod(leaf.size)), {}
  for name, d in directions.items():
    rms_B = jnp.sqrt(squares[name] / jnp.maximum(sizes[name], 1))
    normalized[name] = d / (broadcast_blocks(rms_B, d) + 1e-30)
  return normalized


class DecayState(NamedTuple):
  count: jax.Array  # int32: updates done


def _decay_afterwards(
  learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
  """W <- (1 - rate · decay) (W + update), from the second update on."""

  def init(params):
    del params
    return DecayState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(
        "params: soap decays weights; call update(gradients, state, params), or use scale_by_soap"
      )
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    shrink = jnp.where(state.count == 0, 0.0, rate * weight_decay)
    shrunk = jax.tree.map(lambda u, w: (u - shrink * (w + u)).astype(u.dtype), updates, params)
    return shrunk, DecayState(state.count + 1)

  return optax.GradientTransformation(init, update)
