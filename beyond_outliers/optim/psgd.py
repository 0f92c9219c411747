"""PSGD Kron: a preconditioner learned by gradient descent on a Lie group (arXiv 1512.04202,
2402.11858).

Of H, a block of averaged gradients, with an upper triangular factor Q for each axis and a probe V
of normal numbers:

  A = Q0 H Q1ᵀ,   B = Q0⁻ᵀ V Q1⁻¹
  Q <- Q - rate · triu(T1 - T2) Q / ‖T1 + T2‖,   where T1, T2 = A Aᵀ, B Bᵀ for Q0 and Aᵀ A, Bᵀ B for Q1
  direction = Q0ᵀQ0 H Q1ᵀQ1

T1 and T2 agree on average where Q0ᵀQ0 ⊗ Q1ᵀQ1 is the inverse root of the second moment of H: then
the direction is white.

Legend: B blocks on this device, D an axis of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.config.optimizers import LEAST_UPDATE_PROBABILITY
from beyond_outliers.optim import blocks, factory
from beyond_outliers.optim.axes import AxesTree, matrix_mask
from beyond_outliers.optim.linalg import triangular
from beyond_outliers.optim.muon import has_average

# On a step that updates factors, whether H has noise added (where they learn from it, where it
# becomes the direction).
NOISE = {"both": (True, True), "preconditioner": (True, False), "none": (False, False)}
NOISE_SCALE = 2.0**-11.5  # times the mean of |H|: the root of float32's epsilon
CHUNK = 2**22  # numbers in the blocks that are worked on at a time: bounds temporary memory

Probes = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


class BlocksState(NamedTuple):
  """What a bucket of blocks carries; the stack axis comes first in every array."""

  momentum: jax.Array | None  # [B, *block] average of gradients; None without momentum
  factors: tuple[jax.Array, ...]  # Q, one an axis: [B, D, D] upper triangular, or [B, D] diagonal
  applied: tuple[
    Any, ...
  ]  # QᵀQ [B, D, D], one an axis, () for diagonal factors; empty without cache
  kept: jax.Array  # [B] updates of factors refused so far, because not finite


class PsgdState(NamedTuple):
  count: jax.Array  # int32: updates done
  since_update: jax.Array  # int32: of these, since factors were updated
  key: jax.Array  # raw and constant: a step's random numbers follow from it and `count`
  blocks: dict[str, BlocksState]


def normal(key: jax.Array, count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del count
  return jax.random.normal(key, shape)


def scale_by_psgd(
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  momentum: float = 0.9,
  max_size_triangular: int = 8192,
  preconditioner_lr: float = 0.1,
  preconditioner_init: float = 1.0,
  update_probability: float | None = None,
  balance_probability: float = 0.01,
  clip_rms: float = 1.1,
  clip_eps: float = 1e-12,
  noise: str = "both",
  cache: bool = True,
  precision: str = "highest",
  seed: int = 0,
  probes: Probes = normal,
) -> optax.GradientTransformation:
  """PSGD's direction, to be subtracted; `psgd` has the arguments' meaning.

  probes: (key of this step and shape, steps before this one, shape of a block) -> V of all blocks
    of that shape."""
  factory.one_of("noise", noise, NOISE)
  averages = has_average(momentum)
  if max_size_triangular < 0:
    raise ValueError(
      f"max_size_triangular = {max_size_triangular}: expected the longest axis to have a "
      "triangular factor, or "
      "0 for diagonal ones only"
    )
  if isinstance(update_probability, (int, float)) and not 0 < update_probability <= 1:
    raise ValueError(
      f"update_probability = {update_probability}: expected the share of steps that update "
      "factors, above 0 and "
      "up to 1, or None for the schedule"
    )
  layout_of = functools.partial(blocks.layout, axes=axes, mesh=mesh)

  def init(params):
    layout = layout_of(params)
    # Factors of padding are zero, and stay so.
    real = layout.constants(lambda leaf: 1.0)

    def bucket(shape: tuple[int, ...], real_B: Any) -> BlocksState:
      start_B = real_B * jnp.asarray(preconditioner_init, layout.dtype) ** (1 / len(shape))
      is_triangular = lambda d: len(shape) == 2 and 1 < d <= max_size_triangular
      ones = lambda d: (
        jnp.eye(d, dtype=layout.dtype) if is_triangular(d) else jnp.ones(d, layout.dtype)
      )
      factors = tuple(jax.vmap(jnp.multiply, (0, None))(start_B, ones(d)) for d in shape)
      momentum = jnp.zeros((len(real_B), *shape), layout.dtype) if averages else None
      return BlocksState(
        momentum, factors, jax.vmap(to_apply)(factors), jnp.zeros(len(real_B), jnp.int32)
      )

    zero = jnp.zeros((), jnp.int32)
    buckets = {name: bucket(b.shape, real[name]) for name, b in layout.buckets.items()}
    return PsgdState(zero, jnp.zeros_like(zero), jax.random.key_data(jax.random.key(seed)), buckets)

  def update(updates, state, params=None):
    del params
    layout = layout_of(updates)
    count, since_update = state.count + 1, state.since_update + 1
    due = since_update >= 1 / probability(state.count)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
    numbers = {
      "momentum": momentum,
      "correction": 1 - momentum**count if averages else 1,
      "rate": preconditioner_lr,
      "clip_rms": clip_rms,
      "clip_eps": clip_eps,
    }
    common = {name: jnp.asarray(value, layout.dtype) for name, value in numbers.items()} | {
      "steps_before": state.count,
      "key": jax.random.key_data(key),
      "due": due,
      "balance": jax.random.uniform(jax.random.fold_in(key, 0)) < balance_probability,
    }
    tree = {name: (g, state.blocks[name]) for name, g in layout.stack(updates).items()}
    with jax.default_matmul_precision(precision):
      done = layout.local(step)(tree, common)
    directions = {name: direction for name, (direction, _) in done.items()}
    new = {name: s for name, (_, s) in done.items()}
    return layout.unstack(directions, updates), PsgdState(
      count, jnp.where(due, 0, since_update), state.key, new
    )

  def probability(steps_before: jax.Array) -> Any:
    if update_probability is None:
      return jnp.clip(jnp.exp(-0.001 * (steps_before - 500)), LEAST_UPDATE_PROBABILITY, 1.0)
    return update_probability

  def step(tree, c):
    return {name: one_bucket(g, s, c) for name, (g, s) in tree.items()}

  def one_bucket(g, s: BlocksState, c):
    def learn(g, s):
      shape = g.shape[1:]
      key = functools.reduce(jax.random.fold_in, shape, jax.random.wrap_key_data(c["key"]))
      probe = probes(key, c["steps_before"], shape).astype(g.dtype)
      return in_chunks(functools.partial(learn_and_apply, c, probe), g, s)

    def only_apply(g, s):
      direction, momentum = in_chunks(functools.partial(average_and_apply, c), g, s)
      return direction, s._replace(momentum=momentum)

    return jax.lax.cond(c["due"], learn, only_apply, g, s)

  # From here on one block.
  def average(c, g, s: BlocksState):
    return c["momentum"] * s.momentum + (1 - c["momentum"]) * g if averages else g

  def average_and_apply(c, g, s: BlocksState):
    mean = average(c, g, s)
    return precondition(c, mean, s.factors, s.applied), mean if averages else None

  def learn_and_apply(c, probe, g, s: BlocksState):
    mean = average(c, g, s)
    noisy = mean + NOISE_SCALE * jnp.mean(jnp.abs(mean)) * probe
    in_learning, in_direction = NOISE[noise]
    a, b = (noisy if in_learning else mean) / c["correction"], probe
    for axis, q in long_axis_first(s.factors):
      a = along(axis, triangular.times, q, a)
      b = along(axis, triangular.transposed_solve, q, b)
    changes = [
      c["rate"] * change(q, jnp.moveaxis(a, axis, 0), jnp.moveaxis(b, axis, 0))
      for axis, q in enumerate(s.factors)
    ]
    largest = jnp.stack(
      [jnp.max(jnp.abs(q - dq)) for q, dq in zip(s.factors, changes, strict=True)]
    )
    # The clip squares what QᵀQ along every axis makes of H.
    ok = jnp.isfinite(jnp.prod(largest) ** 4)
    geometric_mean = jnp.exp(jnp.mean(jnp.log(largest)))
    scales = jnp.where(c["balance"] & ok & (geometric_mean > 0), geometric_mean / largest, 1)
    factors = tuple(
      scale * (q - jnp.where(ok, dq, 0))
      for q, dq, scale in zip(s.factors, changes, scales, strict=True)
    )
    applied = to_apply(factors)
    direction = precondition(c, noisy if in_direction else mean, factors, applied)
    return direction, BlocksState(mean if averages else None, factors, applied, s.kept + ~ok)

  def to_apply(factors):
    return tuple(triangular.square(q) if q.ndim == 2 else () for q in factors) if cache else ()

  def precondition(c, x, factors, applied):
    """x: H times the correction, which so costs nothing."""
    for axis, q in long_axis_first(factors):
      if cache and q.ndim == 2:
        x = along(axis, jnp.matmul, applied[axis], x)
      else:
        x = along(axis, triangular.transposed_times, q, along(axis, triangular.times, q, x))
    rms = jnp.sqrt(jnp.mean(x * x)) / c["correction"]
    return x * (jnp.minimum(1, c["clip_rms"] / (rms + c["clip_eps"])) / c["correction"])

  return optax.GradientTransformation(init, update)


@factory.static_integers
def psgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  momentum: float = 0.9,
  max_size_triangular: int = 8192,
  preconditioner_lr: float = 0.1,
  preconditioner_init: float = 1.0,
  update_probability: float | None = None,
  balance_probability: float = 0.01,
  clip_rms: float = 1.1,
  clip_eps: float = 1e-12,
  noise: str = "both",
  weight_decay: float = 0.0,
  cache: bool = True,
  precision: str = "highest",
  seed: int = 0,
) -> optax.GradientTransformation:
  """PSGD with Kronecker factors as kron_torch has it (evanatyourservice/kron_torch, 884427c).

  momentum: decay of the average of gradients, bias-corrected; factors learn from the average. The
    Python number 0 keeps none.
  max_size_triangular: longer axes have a diagonal factor, as have axes of length 1, vectors and
    scalars.
  preconditioner_lr, preconditioner_init: rate of the factors' update; what the product of all
    factors is at first.
  update_probability: factors are updated when this many steps have passed: one over it. None:
    min(1, exp((500 - n) / 1000)) at the n-th step, at least 0.03. No step is drawn by chance.
  balance_probability: that an update gives a block's factors the same largest number; this changes
    nothing but their range.
  clip_rms, clip_eps: the largest RMS of a slice's direction; added to the RMS before it is compared
    (pytorch_optimizer: 1e-6).
  noise: whether an update of factors adds a little of V to H: "both", in the direction of that step
    too (kron_torch), "preconditioner", not there (psgd_jax), or "none" (pytorch_optimizer).
  weight_decay: decoupled, of matrices only.
  cache: keep QᵀQ from one update of factors to the next; False halves that part of the state, and
    doubles the products of steps without update.
  precision: of matrix products on TPU and GPU, as jax.default_matmul_precision takes it.
  seed: of V and of balancing. V is drawn once a step for each shape of blocks, and is the same for
    all of that shape: what a block learns has the same law, and does not depend on how parameters
    are stacked, ordered or sharded.

  An update that is not finite, or would let the direction overflow, leaves a block's factors as
  they are, and is counted. State, bytes a number of an m x n block in float32: 4 + 8 (m² + n²) /
  mn, 4 + 4 (m² + n²) / mn without cache; without the terms of axes that have a diagonal factor."""
  direction = scale_by_psgd(
    axes=axes,
    mesh=mesh,
    momentum=momentum,
    max_size_triangular=max_size_triangular,
    preconditioner_lr=preconditioner_lr,
    preconditioner_init=preconditioner_init,
    update_probability=update_probability,
    balance_probability=balance_probability,
    clip_rms=clip_rms,
    clip_eps=clip_eps,
    noise=noise,
    cache=cache,
    precision=precision,
    seed=seed,
  )
  decay = optax.add_decayed_weights(weight_decay, matrix_mask(axes))
  return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))


def change(q: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """triu(A Aᵀ - B Bᵀ) Q / ‖A Aᵀ + B Bᵀ‖, with a lower bound of the norm; A and B [D, rest] or
  [D]."""
  rest = tuple(range(1, a.ndim))
  t1_D, t2_D = jnp.sum(a * a, rest), jnp.sum(b * b, rest)  # the diagonals
  largest = jnp.max(t1_D + t2_D)
  largest = jnp.where(largest > 0, largest, 1)
  if q.ndim == 1:
    return (t1_D - t2_D) / largest * q
  t1, t2 = triangular.gram(a), triangular.gram(b)
  # Two power iterations from the longest column. Over the largest number, no square overflows.
  total = [(x + y) / largest for x, y in zip(t1, t2, strict=True)]
  total_times = lambda x_D: (a @ (a.T @ x_D) + b @ (b.T @ x_D)) / largest
  longest = jnp.argmax(triangular.column_squares(total))
  x_D = total_times((a @ a[longest] + b @ b[longest]) / largest)
  norm = largest * jnp.linalg.norm(total_times(x_D)) / jnp.linalg.norm(x_D)
  return triangular.product([x - y for x, y in zip(t1, t2, strict=True)], q) / jnp.where(
    norm > 0, norm, 1
  )


def along(
  axis: int, function: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, x: jax.Array
) -> jax.Array:
  """function(q, x) with an axis of x as its first."""
  return jnp.moveaxis(function(q, jnp.moveaxis(x, axis, 0)), 0, axis)


def long_axis_first(factors: tuple[jax.Array, ...]) -> list[tuple[int, jax.Array]]:
  """(axis, factor), in the order in which products are fastest on CPUs."""
  return list(enumerate(factors))[::-1]


def in_chunks(function: Callable[..., Any], *trees: Any) -> Any:
  """function of each block, the first axis of all arrays, for as many blocks at a time as `CHUNK`
  allows."""
  count, *shape = jax.tree.leaves(trees)[0].shape
  together = max(
    k for k in range(1, count + 1) if count % k == 0 and (k == 1 or k * math.prod(shape) <= CHUNK)
  )
  chunks = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), trees)
  done = jax.lax.map(lambda chunk: jax.vmap(function)(*chunk), chunks)
  return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), done)
