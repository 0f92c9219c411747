"""PSGD Kron: a preconditioner learned by gradient descent on a Lie group (arXiv 1512.04202, 2402.11858).

With a triangular factor Q for each axis of a block H of averaged gradients, and a probe V of normal numbers:

  A = Q0 H Q1ᵀ,   B = Q0⁻ᵀ V Q1⁻¹
  Q <- Q - rate · triu(T1 - T2) Q / ‖T1 + T2‖,   T1, T2 = A Aᵀ, B Bᵀ for Q0 and Aᵀ A, Bᵀ B for Q1
  direction = Q0ᵀQ0 H Q1ᵀQ1

T1 and T2 agree on average where Q0ᵀQ0 ⊗ Q1ᵀQ1 is the inverse root of the second moment of H: then the direction is white.

Legend: B blocks on this device, C of them in a chunk; M and N axes of a block, D one of them, R the other.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.optim import blocks, signature, triangles
from beyond_outliers.optim.axes import AxesTree, matrix_mask
from beyond_outliers.optim.muon import has_average

# Which H has noise added on a step that updates factors: (the one they learn from, the one that becomes the direction).
NOISE = {
  "both": (True, True),
  "preconditioner": (True, False),
  "none": (False, False),
}
NOISE_SCALE = 2.0 ** -11.5              # times the mean of |H|: the root of float32's epsilon
CHUNK = 2 ** 22                         # numbers in the blocks whose factors are updated at a time: bounds temporary memory


class BlocksState(NamedTuple):
  """What a bucket of blocks carries; the stack axis comes first in every array."""
  momentum: jax.Array | None            # [B, *block] average of gradients; None without momentum
  factors: tuple[jax.Array, ...]        # Q, one an axis: [B, D, D] upper triangular, or [B, D] diagonal
  applied: tuple[Any, ...]              # QᵀQ [B, D, D], one an axis; () for diagonal factors, and where it is not kept
  kept: jax.Array                       # [B] updates of the factors refused so far, because not finite


class PsgdState(NamedTuple):
  count: jax.Array                      # int32: updates done
  since_update: jax.Array               # int32: of these, since factors were updated
  key: jax.Array                        # raw and constant: the numbers of a step come from it and from `count`
  blocks: dict[str, BlocksState]


# (key of this step and shape, steps before this one, shape of a block) -> V.
Probes = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


def normal(key: jax.Array, count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del count
  return jax.random.normal(key, shape)


def scale_by_psgd(
    *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None, momentum: float = 0.9, max_size_triangular: int = 8192,
    preconditioner_lr: float = 0.1, preconditioner_init: float = 1.0, update_probability: float | None = None,
    balance_probability: float = 0.01, clip_rms: float = 1.1, clip_eps: float = 1e-12, noise: str = "both", cache: bool = True,
    precision: str = "highest", seed: int = 0, probes: Probes = normal) -> optax.GradientTransformation:
  """PSGD's direction, to be subtracted; `psgd` has the arguments' meaning. probes: where V comes from."""
  signature.one_of("noise", noise, NOISE)
  averages = has_average(momentum)
  if max_size_triangular < 0:
    raise ValueError(f"max_size_triangular = {max_size_triangular}: expected the longest axis with a triangular factor, or 0 "
                     "for none")
  if isinstance(update_probability, (int, float)) and not 0 < update_probability <= 1:
    raise ValueError(f"update_probability = {update_probability}: expected above 0, at most 1, or None for the schedule")
  layout_of = functools.partial(blocks.layout, axes=axes, mesh=mesh)

  def is_triangular(shape: tuple[int, ...], d: int) -> bool:
    return len(shape) == 2 and 1 < d <= max_size_triangular

  def init(params):
    layout = layout_of(params)
    real = layout.constants(lambda leaf: 1.0)               # a padding block's factors are zero, and remain so

    def bucket(shape: tuple[int, ...], real_B: Any) -> BlocksState:
      start_B = real_B * jnp.asarray(preconditioner_init, layout.dtype) ** (1 / len(shape))
      factors = tuple(start_B[:, None, None] * jnp.eye(d, dtype=layout.dtype) if is_triangular(shape, d)
                      else start_B[:, None] * jnp.ones(d, layout.dtype) for d in shape)
      momentum = jnp.zeros((len(real_B), *shape), layout.dtype) if averages else None
      return BlocksState(momentum, factors, jax.vmap(to_apply)(factors), jnp.zeros(len(real_B), jnp.int32))

    buckets = {name: bucket(b.shape, real[name]) for name, b in layout.buckets.items()}
    zero = jnp.zeros((), jnp.int32)
    return PsgdState(zero, zero, jax.random.key_data(jax.random.key(seed)), buckets)

  def update(updates, state, params=None):
    del params
    layout = layout_of(updates)
    number = functools.partial(jnp.asarray, dtype=layout.dtype)
    count = optax.safe_increment(state.count)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
    due = (state.since_update + 1).astype(layout.dtype) >= 1 / probability(state.count.astype(layout.dtype))
    balance = jax.random.uniform(jax.random.fold_in(key, 0)) < balance_probability
    decay = number(momentum)
    common = {"due": due, "balance": balance, "key": jax.random.key_data(key), "count": state.count, "momentum": decay,
              "correction": 1 - decay ** count, "rate": number(preconditioner_lr), "clip_rms": number(clip_rms),
              "clip_eps": number(clip_eps)}
    tree = {name: (g, state.blocks[name]) for name, g in layout.stack(updates).items()}
    with jax.default_matmul_precision(precision):
      done = layout.local(step)(tree, common)
    directions = {name: direction for name, (direction, _) in done.items()}
    new = {name: s for name, (_, s) in done.items()}
    return layout.unstack(directions, updates), PsgdState(count, jnp.where(due, 0, state.since_update + 1), state.key, new)

  def probability(count: jax.Array) -> Any:
    if update_probability is None:
      return jnp.clip(jnp.exp(-0.001 * (count - 500)), 0.03, 1.0)
    return update_probability

  def step(tree, c):
    return {name: one_bucket(*of_bucket, c) for name, of_bucket in tree.items()}

  def one_bucket(g, s: BlocksState, c):
    h = g
    if averages:
      s = s._replace(momentum=c["momentum"] * s.momentum + (1 - c["momentum"]) * g)
      h = s.momentum / c["correction"]
    learned = s.factors, s.applied, s.kept
    h, (factors, applied, kept) = jax.lax.cond(c["due"], functools.partial(learn, c), lambda h, learned: (h, learned), h, learned)
    directions = jax.vmap(functools.partial(precondition, c))(h, factors, applied)
    return directions, s._replace(factors=factors, applied=applied, kept=kept)

  def learn(c, h, learned):
    """The factors' update, for as many blocks at a time as `CHUNK` allows."""
    shape = h.shape[1:]
    key = functools.reduce(jax.random.fold_in, shape, jax.random.wrap_key_data(c["key"]))
    probe = probes(key, c["count"], shape).astype(h.dtype)
    together = max(k for k in range(1, len(h) + 1) if len(h) % k == 0 and (k == 1 or k * math.prod(shape) <= CHUNK))
    chunks = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), (h, learned))

    def one_chunk(i, chunks):
      renewed = jax.vmap(functools.partial(learn_one, c, probe))(*jax.tree.map(lambda x: x[i], chunks))
      return jax.tree.map(lambda x, new: x.at[i].set(new), chunks, renewed)
    chunks = jax.lax.fori_loop(0, len(h) // together, one_chunk, chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunks)

  def learn_one(c, probe, h, learned):
    """One block's."""
    factors, applied, kept = learned
    noisy = h + NOISE_SCALE * jnp.mean(jnp.abs(h)) * probe
    in_learning, in_direction = NOISE[noise]
    a, b = noisy if in_learning else h, probe
    for axis, q in enumerate(factors):
      a = along(axis, triangles.times, q, a)
      b = along(axis, triangles.solve, q, b)
    changes = [c["rate"] * change(q, jnp.moveaxis(a, axis, 0), jnp.moveaxis(b, axis, 0)) for axis, q in enumerate(factors)]
    tops = jnp.stack([jnp.max(jnp.abs(q - dq)) for q, dq in zip(factors, changes, strict=True)])
    # The square of what factors may do to H must be finite too: the clip takes it.
    ok = jnp.isfinite(jnp.prod(tops) ** 4)
    mean = jnp.exp(jnp.mean(jnp.log(tops)))
    scales = jnp.where(c["balance"] & ok & (mean > 0), mean / tops, 1)
    factors = tuple((q - jnp.where(ok, dq, 0)) * scale for q, dq, scale in zip(factors, changes, scales, strict=True))
    return noisy if in_direction else h, (factors, to_apply(factors), kept + ~ok)

  def to_apply(factors):
    return tuple(triangles.square(q) if q.ndim == 2 else () for q in factors) if cache else ()

  def precondition(c, h, factors, applied):
    for axis, q in enumerate(factors):
      if cache and q.ndim == 2:
        h = along(axis, jnp.matmul, applied[axis], h)
      else:
        h = along(axis, triangles.times_transposed, q, along(axis, triangles.times, q, h))
    rms = jnp.sqrt(jnp.mean(h * h))
    return h * jnp.minimum(1, c["clip_rms"] / (rms + c["clip_eps"]))

  return optax.GradientTransformation(init, update)


@signature.static_integers
def psgd(
    learning_rate: optax.ScalarOrSchedule, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None, momentum: float = 0.9,
    max_size_triangular: int = 8192, preconditioner_lr: float = 0.1, preconditioner_init: float = 1.0,
    update_probability: float | None = None, balance_probability: float = 0.01, clip_rms: float = 1.1, clip_eps: float = 1e-12,
    noise: str = "both", weight_decay: float = 0.0, cache: bool = True, precision: str = "highest",
    seed: int = 0) -> optax.GradientTransformation:
  """PSGD Kron as in kron_torch (evanatyourservice, 884427c), with triangular factors learned from pairs (H, V).

  ...
  """
  direction = scale_by_psgd(
    axes=axes, mesh=mesh, momentum=momentum, max_size_triangular=max_size_triangular, preconditioner_lr=preconditioner_lr,
    preconditioner_init=preconditioner_init, update_probability=update_probability, balance_probability=balance_probability,
    clip_rms=clip_rms, clip_eps=clip_eps, noise=noise, cache=cache, precision=precision, seed=seed)
  decay = optax.add_decayed_weights(weight_decay, matrix_mask(axes))
  return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))


def along(axis: int, function: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, x: jax.Array) -> jax.Array:
  """function(q, x) with the axis of x first."""
  return jnp.moveaxis(function(q, jnp.moveaxis(x, axis, 0)), 0, axis)


def change(q: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """triu(A Aᵀ - B Bᵀ) Q / ‖A Aᵀ + B Bᵀ‖, for A and B [D, R] or [D]."""
  rest = tuple(range(1, a.ndim))
  t1_D, t2_D = jnp.sum(a * a, rest), jnp.sum(b * b, rest)                          # the diagonals
  largest = jnp.max(t1_D + t2_D)                                                   # number of A Aᵀ + B Bᵀ
  over = lambda x, norm: x / jnp.where(norm > 0, norm, 1)
  if q.ndim == 1:
    return over((t1_D - t2_D) * q, largest)
  t1, t2 = triangles.gram(a), triangles.gram(b)
  total_DxD = triangles.mirror([over(x + y, largest) for x, y in zip(t1, t2, strict=True)])
  difference = [jnp.triu(over(x - y, largest)) for x, y in zip(t1, t2, strict=True)]
  return over(triangles.product(difference, q), lower_bound(total_DxD))


def lower_bound(s_DxD: jax.Array) -> jax.Array:
  """Of the spectral norm of a symmetric matrix: two power iterations from its longest column."""
  x_D = s_DxD @ s_DxD[jnp.argmax(jnp.sum(s_DxD * s_DxD, 0))]
  return jnp.linalg.norm(s_DxD @ x_D) / jnp.linalg.norm(x_D)
