"""PSGD Kron: a preconditioner learned by gradient descent on a Lie group.

arXiv 1512.04202, 2402.11858.

H is a block of averaged gradients, Q an upper triangular factor for each of its axes, V a probe of
normal random numbers:

  A = Q0 H Q1ᵀ,   B = Q0⁻ᵀ V Q1⁻¹
  Q <- Q - rate · triu(T1 - T2) Q / ‖T1 + T2‖,   T1, T2 = A Aᵀ, B Bᵀ for Q0, Aᵀ A, Bᵀ B for Q1
  direction = Q0ᵀQ0 H Q1ᵀQ1

T1 and T2 agree on average when Q0ᵀQ0 ⊗ Q1ᵀQ1 is the inverse square root of H's second moment; the
direction is then white.

Legend: B blocks on this device, D an axis of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.config import optimizers
from beyond_outliers.config.hyperparameters import official
from beyond_outliers.ops import random
from beyond_outliers.ops.extremes import max_magnitude
from beyond_outliers.optim import blocks, blockwise, factory
from beyond_outliers.optim.axes import AxesTree, matrix_mask
from beyond_outliers.optim.linalg import triangular
from beyond_outliers.optim.linalg.chunks import in_chunks
from beyond_outliers.optim.muon import has_average

# On a step that updates factors, whether noise is added to H (as what they learn from, as what
# becomes the direction).
NOISE = {"both": (True, True), "preconditioner": (True, False), "none": (False, False)}
NOISE_SCALE = 2.0**-11.5  # relative to the mean of |H|: the square root of float32's epsilon

Arrays = tuple[jax.Array, ...]
Probes = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Psgd(optimizers.Psgd):
  """Hyperparameters of PSGD, including those that no configuration sets."""

  precision: str = official(
    "highest", "of matrix products on TPU and GPU, as jax.default_matmul_precision takes it"
  )


class BlocksState(NamedTuple):
  """State of a bucket of blocks; the stack axis comes first in every array."""

  momentum: jax.Array | None  # [B, *block] average of gradients; None without momentum
  factors: Arrays  # Q, one per axis: [B, D, D] upper triangular, or [B, D] diagonal
  applied: tuple[Any, ...]  # per axis QᵀQ [B, D, D], or () if diagonal; empty without cache
  kept: jax.Array  # [B] updates of factors refused so far: not finite, or the direction overflows


class PsgdState(NamedTuple):
  count: jax.Array  # int32: updates done
  since_update: jax.Array  # int32: updates done since the factors were last updated
  key: jax.Array  # raw and constant: with `count` it determines a step's random numbers
  blocks: blockwise.ByBucket


class PsgdClock(NamedTuple):
  """What a step knows of its time, the same for all blocks."""

  steps_before: jax.Array  # int32: steps before this one
  key: jax.Array  # raw: of this step's random numbers
  due: jax.Array  # bool: whether this step updates factors
  balance: jax.Array  # bool: whether such an update also balances them
  correction: jax.Array  # divides averages to remove their bias


def drawn(key: jax.Array, count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del count
  return random.normal(key, shape)


@factory.arguments_of(_Psgd, without=("learning_rate", "weight_decay"))
def scale_by_psgd(
  h: _Psgd, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None, probes: Probes = drawn
) -> optax.GradientTransformation:
  """PSGD's direction, to be subtracted.

  probes: (key of this step and shape, steps before this one, shape of a block) -> the V of all
    blocks of that shape."""
  return _direction(h, axes, mesh, probes)


@factory.arguments_of(_Psgd)
def psgd(
  h: _Psgd, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """PSGD with Kronecker factors, following evanatyourservice/kron_torch (884427c).

  Each step draws one V per block shape, shared by all blocks of that shape: to each block it is as
  random as one of its own, and the same however parameters are stacked, ordered or sharded. An
  average is kept unless momentum is the Python number 0.

  An update of factors that is not finite, or would make the direction overflow, is refused and
  counted. State, bytes per element of an m x n block in float32: 4 + 8 (m² + n²) / mn, or 4 + 4
  (m² + n²) / mn without cache; an axis with a diagonal factor has no such term."""
  return optax.chain(
    _direction(h, axes, mesh, drawn),
    optax.add_decayed_weights(h.weight_decay, matrix_mask(axes)),
    optax.scale_by_learning_rate(h.learning_rate),
  )


def _direction(
  h: _Psgd, axes: AxesTree, mesh: jax.sharding.Mesh | None, probes: Probes
) -> optax.GradientTransformation:
  return blockwise.transformation(
    h,
    functools.partial(blocks.layout, axes=axes, mesh=mesh),
    _init_bucket,
    functools.partial(_step, probes),
    traced=("momentum", "preconditioner_lr", "clip_rms", "clip_eps"),
    start=functools.partial(_start, h),
    advance=functools.partial(_advance, h),
  )


def _init_bucket(h: _Psgd, bucket: blocks.Bucket, dtype: np.dtype) -> BlocksState:
  # The factors of padding blocks are zero and stay zero.
  size = jnp.asarray(h.preconditioner_init, dtype) ** (1 / len(bucket.shape))
  start_B = bucket.real.astype(dtype) * size

  def factor(d: int) -> jax.Array:
    triangular = len(bucket.shape) == 2 and 1 < d <= h.max_size_triangular
    ones = jnp.eye(d, dtype=dtype) if triangular else jnp.ones(d, dtype)
    return jax.vmap(jnp.multiply, (0, None))(start_B, ones)

  factors = tuple(map(factor, bucket.shape))
  with jax.default_matmul_precision(h.precision):
    applied = jax.vmap(functools.partial(_to_apply, h))(factors)
  return BlocksState(
    bucket.zeros(*bucket.shape, dtype=dtype) if has_average(h.momentum) else None,
    factors,
    applied,
    bucket.zeros(dtype=jnp.int32),
  )


def _start(h: _Psgd, blocks: blockwise.ByBucket) -> PsgdState:
  zero = jnp.zeros((), jnp.int32)
  return PsgdState(zero, jnp.zeros_like(zero), jax.random.key_data(jax.random.key(h.seed)), blocks)


def _advance(h: _Psgd, state: PsgdState) -> tuple[PsgdState, PsgdClock]:
  count, since_update = state.count + 1, state.since_update + 1
  due = since_update >= 1 / _update_probability(h, state.count)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
  balance = jax.random.uniform(jax.random.fold_in(key, 0)) < h.balance_probability
  correction = 1 - h.momentum**count if has_average(h.momentum) else 1
  clock = PsgdClock(state.count, jax.random.key_data(key), due, balance, jnp.asarray(correction))
  return state._replace(count=count, since_update=jnp.where(due, 0, since_update)), clock


def _update_probability(h: _Psgd, steps_before: jax.Array) -> Any:
  if h.update_probability is None:
    least = optimizers.LEAST_UPDATE_PROBABILITY
    return jnp.clip(jnp.exp(-0.001 * (steps_before - 500)), least, 1.0)
  return h.update_probability


def _step(
  probes: Probes, h: _Psgd, clock: PsgdClock, g: jax.Array, s: BlocksState, constants: tuple[()]
) -> tuple[jax.Array, BlocksState]:
  del constants
  clock = clock._replace(correction=clock.correction.astype(g.dtype))

  def learn(g: jax.Array, s: BlocksState) -> tuple[jax.Array, BlocksState]:
    shape = g.shape[1:]
    key = functools.reduce(jax.random.fold_in, shape, jax.random.wrap_key_data(clock.key))
    probe = probes(key, clock.steps_before, shape).astype(g.dtype)
    return in_chunks(functools.partial(_learn_and_apply, h, clock, probe), g, s)

  def only_apply(g: jax.Array, s: BlocksState) -> tuple[jax.Array, BlocksState]:
    direction, momentum = in_chunks(functools.partial(_average_and_apply, h, clock), g, s)
    return direction, s._replace(momentum=momentum)

  with jax.default_matmul_precision(h.precision):
    return jax.lax.cond(clock.due, learn, only_apply, g, s)


def _average_and_apply(
  h: _Psgd, clock: PsgdClock, g: jax.Array, s: BlocksState
) -> tuple[jax.Array, jax.Array | None]:
  """(direction, average) of one block, on a step that does not update factors."""
  mean = _average(h, g, s)
  return _precondition(h, clock, mean, s.factors, s.applied), _kept_average(mean, s)


def _learn_and_apply(
  h: _Psgd, clock: PsgdClock, probe: jax.Array, g: jax.Array, s: BlocksState
) -> tuple[jax.Array, BlocksState]:
  mean = _average(h, g, s)
  noisy = mean + NOISE_SCALE * jnp.mean(jnp.abs(mean)) * probe
  in_learning, in_direction = NOISE[h.noise]
  learned_from = (noisy if in_learning else mean) / clock.correction
  factors, ok = _update_factors(h, clock, s.factors, learned_from, probe)
  applied = _to_apply(h, factors)
  direction = _precondition(h, clock, noisy if in_direction else mean, factors, applied)
  return direction, BlocksState(_kept_average(mean, s), factors, applied, s.kept + ~ok)


def _average(h: _Psgd, g: jax.Array, s: BlocksState) -> jax.Array:
  return g if s.momentum is None else h.momentum * s.momentum + (1 - h.momentum) * g


def _kept_average(mean: jax.Array, s: BlocksState) -> jax.Array | None:
  return None if s.momentum is None else mean


def _update_factors(
  h: _Psgd, clock: PsgdClock, factors: Arrays, x: jax.Array, probe: jax.Array
) -> tuple[Arrays, jax.Array]:
  """(factors updated from x, and balanced where due; whether the update was accepted)."""
  a, b = x, probe
  for axis, q in long_axis_first(factors):
    a = along(axis, triangular.times, q, a)
    b = along(axis, triangular.transposed_solve, q, b)
  changes = [
    h.preconditioner_lr * change(q, jnp.moveaxis(a, axis, 0), jnp.moveaxis(b, axis, 0))
    for axis, q in enumerate(factors)
  ]
  largest = jnp.stack([max_magnitude(q - dq) for q, dq in zip(factors, changes, strict=True)])
  # Clipping squares the direction, which holds the square of each factor: a fourth power.
  ok = jnp.isfinite(jnp.prod(largest) ** 4)
  geometric_mean = jnp.exp(jnp.mean(jnp.log(largest)))
  scales = jnp.where(clock.balance & ok & (geometric_mean > 0), geometric_mean / largest, 1)
  return tuple(
    scale * (q - jnp.where(ok, dq, 0))
    for q, dq, scale in zip(factors, changes, scales, strict=True)
  ), ok


def _to_apply(h: _Psgd, factors: Arrays) -> tuple[Any, ...]:
  return tuple(triangular.square(q) if q.ndim == 2 else () for q in factors) if h.cache else ()


def _precondition(
  h: _Psgd, clock: PsgdClock, x: jax.Array, factors: Arrays, applied: tuple[Any, ...]
) -> jax.Array:
  """The direction, clipped to an RMS. x: H times the bias correction, divided out at the end."""
  for axis, q in long_axis_first(factors):
    if h.cache and q.ndim == 2:
      x = along(axis, jnp.matmul, applied[axis], x)
    else:
      x = along(axis, triangular.transposed_times, q, along(axis, triangular.times, q, x))
  rms = jnp.sqrt(jnp.mean(x * x)) / clock.correction
  return x * (jnp.minimum(1, h.clip_rms / (rms + h.clip_eps)) / clock.correction)


def change(q: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """triu(A Aᵀ - B Bᵀ) Q / ‖A Aᵀ + B Bᵀ‖, where a lower bound stands for the norm.

  A and B: [D, rest] or [D]."""
  rest = tuple(range(1, a.ndim))
  t1_D, t2_D = jnp.sum(a * a, rest), jnp.sum(b * b, rest)  # the diagonals
  largest = max_magnitude(t1_D + t2_D)
  largest = jnp.where(largest > 0, largest, 1)
  if q.ndim == 1:
    return (t1_D - t2_D) / largest * q
  t1, t2 = triangular.gram(a), triangular.gram(b)
  # Two power iterations from the longest column. Division by the largest entry: squares then
  # cannot overflow.
  total = [(x + y) / largest for x, y in zip(t1, t2, strict=True)]
  longest = jnp.argmax(triangular.column_squares(total))

  def total_times(x_D: jax.Array) -> jax.Array:
    return (a @ (a.T @ x_D) + b @ (b.T @ x_D)) / largest

  x_D = total_times((a @ a[longest] + b @ b[longest]) / largest)
  norm = largest * jnp.linalg.norm(total_times(x_D)) / jnp.linalg.norm(x_D)
  difference = [x - y for x, y in zip(t1, t2, strict=True)]
  return triangular.triangle_product(difference, q) / jnp.where(norm > 0, norm, 1)


def along(
  axis: int, function: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, x: jax.Array
) -> jax.Array:
  """function(q, x) applied along the given axis of x."""
  return jnp.moveaxis(function(q, jnp.moveaxis(x, axis, 0)), 0, axis)


def long_axis_first(factors: tuple[jax.Array, ...]) -> list[tuple[int, jax.Array]]:
  """(axis, factor) pairs, in the order in which products are fastest on CPUs."""
  return list(enumerate(factors))[::-1]
