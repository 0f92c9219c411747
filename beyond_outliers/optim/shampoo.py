"""Distributed Shampoo (arXiv 1802.09568; 2309.06497): every axis of a block has a factor, whose
inverse root preconditions it.

With the arguments' defaults this is Meta's implementation without grafting; what Google's does
otherwise has a switch each.

Legend: B blocks on this device, M and N axes of a block, D the axis of a factor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.config.optimizers import MAX_BFLOAT16_B2, WITH_EIGENVALUE_CORRECTION
from beyond_outliers.optim import blocks, factory
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.eigenvalue_corrected import scale_by_eigenvalue_corrected_shampoo
from beyond_outliers.optim.linalg import packing
from beyond_outliers.optim.linalg.inverse_root import ROOTS, check
from beyond_outliers.optim.linalg.kronecker import add_gram, along, per_block
from beyond_outliers.optim.refresh import REFRESHES


class Roots(NamedTuple):
  """The inverse roots of a bucket's factors, one a preconditioned axis: all that a refresh
  renews."""

  values: tuple[
    jax.Array, ...
  ]  # [B, D, D] or packed, float32 or bfloat16; the identity until there is one
  bases: tuple[Any, ...]  # what a warm-started root begins from
  residual: Any  # [B, axes] of the last root computed, taken or refused
  condition: Any  # [B, axes] largest eigenvalue of its factor over the smallest it took
  age: Any  # [B, axes] steps since the root in use was computed; -1: never
  kept: Any  # [B, axes] roots refused so far, because not finite or of too large a residual


class BlocksState(NamedTuple):
  """What a bucket of blocks carries; the stack axis comes first in every array."""

  momentum: jax.Array  # [B, *block] of gradients; with momentum="update", of preconditioned ones
  graft_momentum: jax.Array | tuple[()]  # [B, *block], momentum="update" only
  second_moment: jax.Array | tuple[()]  # [B, *block] of the grafting method, where it has one
  factors: tuple[
    jax.Array, ...
  ]  # one a preconditioned axis, [B, D, D] or packed, float32 or bfloat16
  roots: Roots


class ShampooState(NamedTuple):
  count: jax.Array  # int32: updates done
  blocks: dict[str, BlocksState]


class Graft(NamedTuple):
  """The method whose step length Shampoo's direction is given: a row of GRAFTS."""

  direction: Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
  ]  # (gradient, second moment, eps) -> direction
  has_second_moment: bool
  bias_correction: bool


GRAFTS: dict[str, Graft | None] = {
  "none": None,
  "sgd": Graft(lambda g, v, eps: g, False, False),
  "adam": Graft(lambda g, v, eps: g / (jnp.sqrt(v) + eps), True, True),
  "rmsprop": Graft(lambda g, v, eps: g / (jnp.sqrt(v) + eps), True, False),
}


def scale_by_shampoo(
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  b1: float = 0.9,
  b2: float = 1.0,
  eps: float = 1e-12,
  eps_mode: str = "absolute",
  bias_correction: bool = True,
  grafting: str = "none",
  graft_granularity: str = "block",
  grafting_b2: float = 0.999,
  grafting_eps: float = 1e-10,
  momentum: str = "gradient",
  root: str = "eigh",
  exponent: float | None = None,
  max_residual: float = 0.1,
  precondition_frequency: int = 1,
  refresh: str = "together",
  start_step: int | None = None,
  block_size: int = 1024,
  long_axes: str = "block",
  merge_dims: bool = False,
  preconditioner_dtype: str = "float32",
  packed: bool = False,
) -> optax.GradientTransformation:
  """Shampoo's direction, to be subtracted; `shampoo` has the arguments' meaning."""
  for name, value, allowed in (
    ("eps_mode", eps_mode, ("absolute", "relative")),
    ("grafting", grafting, GRAFTS),
    ("graft_granularity", graft_granularity, ("block", "parameter")),
    ("momentum", momentum, ("gradient", "update")),
    ("root", root, ROOTS),
    ("refresh", refresh, REFRESHES),
    ("long_axes", long_axes, ("block", "skip")),
    ("preconditioner_dtype", preconditioner_dtype, ("float32", "bfloat16")),
  ):
    factory.one_of(name, value, allowed)
  for name, value in (
    ("precondition_frequency", precondition_frequency),
    ("block_size", block_size),
  ):
    if value < 1:
      raise ValueError(f"{name} = {value}: expected at least 1")
  if isinstance(exponent, jax.Array):  # it chooses the iteration
    raise TypeError(
      "exponent: must be a Python number; give inject_hyperparams static_args='exponent'"
    )
  if preconditioner_dtype == "bfloat16" and not isinstance(b2, jax.Array) and b2 > MAX_BFLOAT16_B2:
    raise ValueError(
      f"b2 = {b2}: averages in bfloat16 stand still above {MAX_BFLOAT16_B2}; choose a smaller one, "
      "or "
      "preconditioner_dtype='float32'"
    )
  if exponent is not None and not exponent > 0:
    raise ValueError(
      f"exponent = {exponent}: expected the positive power that a factor's inverse is taken to, "
      "such as 0.25"
    )
  for order in (1, 2):
    check(root, _order_of_root(exponent, order))
  start = precondition_frequency if start_step is None else start_step
  graft = GRAFTS[grafting]
  layout_of = functools.partial(
    blocks.layout,
    axes=axes,
    mesh=mesh,
    block_size=block_size if long_axes == "block" else None,
    merge_up_to=block_size if merge_dims else 0,
  )

  def preconditioned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis, length in enumerate(shape) if length <= block_size)

  def store(a_BxDxD: jax.Array, dtype: Any) -> jax.Array:
    return (packing.pack(a_BxDxD) if packed else a_BxDxD).astype(dtype)

  def load(stored: jax.Array, d: int, dtype: Any) -> jax.Array:
    return packing.unpack(stored.astype(dtype), d) if packed else stored.astype(dtype)

  def init(params):
    layout = layout_of(params)
    # float64 is for checking the mathematics: there nothing is stored in less.
    stored = jnp.bfloat16 if preconditioner_dtype == "bfloat16" else layout.dtype

    def bucket(shape: tuple[int, ...], count: int) -> BlocksState:
      zeros = lambda: jnp.zeros((count, *shape), layout.dtype)
      lengths = [shape[axis] for axis in preconditioned(shape)]
      # Orbax saves no empty arrays: without a factor there is none.
      numbers = lambda value, dtype: (
        jnp.full((count, len(lengths)), value, dtype) if lengths else ()
      )
      identity = lambda d: jnp.broadcast_to(jnp.eye(d, dtype=layout.dtype), (count, d, d))
      first = eps if eps_mode == "relative" else 0.0
      return BlocksState(
        momentum=zeros(),
        graft_momentum=zeros() if momentum == "update" else (),
        second_moment=zeros() if graft and graft.has_second_moment else (),
        factors=tuple(store(first * identity(d), stored) for d in lengths),
        roots=Roots(
          values=tuple(store(identity(d), stored) for d in lengths),
          bases=tuple(
            jnp.zeros((count, d, d), layout.dtype) if ROOTS[root].warm else () for d in lengths
          ),
          residual=numbers(0, layout.dtype),
          condition=numbers(0, layout.dtype),
          age=numbers(-1, jnp.int32),
          kept=numbers(0, jnp.int32),
        ),
      )

    return ShampooState(
      jnp.zeros((), jnp.int32),
      {name: bucket(b.shape, b.padded) for name, b in layout.buckets.items()},
    )

  def update(updates, state, params=None):
    del params
    layout = layout_of(updates)
    count = state.count + 1
    common = {
      "t": count,
      "b1": b1,
      "b2": b2,
      "eps": eps,
      "grafting_b2": grafting_b2,
      "grafting_eps": grafting_eps,
      "max_residual": max_residual,
    }
    common = {
      name: jnp.asarray(value, jnp.int32 if name == "t" else layout.dtype)
      for name, value in common.items()
    }
    real = {
      name: np.arange(bucket.padded) < bucket.count for name, bucket in layout.buckets.items()
    }
    numbers = layout.numbers()

    def step(given, common):
      return {
        name: one_bucket(g, s, real_B, number_B, common, layout.buckets[name].shape)
        for name, (g, s, real_B, number_B) in given.items()
      }

    given = {
      name: (g, state.blocks[name], real[name], numbers[name])
      for name, g in layout.stack(updates).items()
    }
    done = layout.local(step)(given, common)
    new = {name: result[0] for name, result in done.items()}
    directions = {name: result[1] for name, result in done.items()}
    if graft:
      squares = {
        name: result[2] for name, result in done.items()
      }  # [B, 2]: of the graft's step, and Shampoo's
      if graft_granularity == "parameter":
        squares = layout.sum_over_slices(squares)
      directions, new = (dict(tree) for tree in (directions, new))
      for name, square in squares.items():
        lengths = jnp.sqrt(square)
        scale = jnp.where(done[name][3], lengths[:, 0] / (lengths[:, 1] + 1e-16), 1)
        directions[name] = directions[name] * per_block(scale, directions[name])
    if momentum == "update":
      for name in new:
        averaged = common["b1"] * new[name].momentum + (1 - common["b1"]) * directions[name]
        new[name] = new[name]._replace(momentum=averaged)
        directions[name] = jnp.where(count >= start, averaged, new[name].graft_momentum)
    return layout.unstack(directions, updates), ShampooState(count, new)

  def one_bucket(
    g: jax.Array,
    s: Any,
    real_B: jax.Array,
    number_B: jax.Array,
    c: dict[str, jax.Array],
    shape: tuple[int, ...],
  ):
    """-> (state, direction, [B, 2] squared lengths of the grafting step and of the direction, [B]
    whether it is Shampoo's).

    A block without roots takes the grafting method's own step, and has no part in the lengths of
    others."""
    t, which = c["t"].astype(g.dtype), preconditioned(shape)
    correction = lambda decay: 1 - decay**t if bias_correction else jnp.ones_like(decay)
    # A decay of 1 sums instead of averaging, and needs no correction.
    weight = jnp.where(c["b2"] < 1, 1 - c["b2"], 1)
    factors = tuple(
      add_gram(load(factor, shape[axis], g.dtype), g, axis, c["b2"], weight)
      for factor, axis in zip(s.factors, which, strict=True)
    )
    norm = jnp.where(c["b2"] < 1, correction(c["b2"]), 1)

    def renew(old: Roots, given) -> Roots:
      factors, real_B = given
      columns, p = [], _order_of_root(exponent, len(shape))
      for i, factor in enumerate(factors):
        new = ROOTS[root].compute(
          factor / norm, p, c["eps"], relative=eps_mode == "relative", basis=old.bases[i]
        )
        ok = jnp.isfinite(new.root).all((1, 2)) & (new.residual <= c["max_residual"])
        choose = lambda new, was, ok=ok: jnp.where(per_block(ok, new), new, was)
        value = choose(store(new.root, old.values[i].dtype), old.values[i])
        basis = jax.tree.map(choose, new.basis, old.bases[i])
        columns.append(
          (
            value,
            basis,
            new.residual,
            new.condition,
            jnp.where(ok, 0, old.age[:, i]),
            old.kept[:, i] + (real_B & ~ok),
          )
        )
      values, bases, *numbers = zip(*columns, strict=True)
      return Roots(values, bases, *(jnp.stack(column, 1) for column in numbers))

    roots = s.roots
    if which:
      roots = roots._replace(age=jnp.where(roots.age < 0, -1, roots.age + 1))
      roots = REFRESHES[refresh](
        roots, number_B, c["t"], start, precondition_frequency, renew, (factors, real_B)
      )
    s = s._replace(
      factors=tuple(store(new, was.dtype) for new, was in zip(factors, s.factors, strict=True)),
      roots=roots,
    )

    if momentum == "gradient":
      average = c["b1"] * s.momentum + (1 - c["b1"]) * g
      fed, s = average / correction(c["b1"]), s._replace(momentum=average)
    else:
      fed = g
    p = fed
    for root_stored, axis in zip(s.roots.values, which, strict=True):
      p = along(axis, load(root_stored, shape[axis], g.dtype), p)
    step = fed
    if graft:
      v: Any = None
      if graft.has_second_moment:
        v = c["grafting_b2"] * s.second_moment + (1 - c["grafting_b2"]) * g * g
        s = s._replace(second_moment=v)
        v = v / (1 - c["grafting_b2"] ** t) if graft.bias_correction and bias_correction else v
      step = graft.direction(fed, v, c["grafting_eps"])
    ready_B = (roots.age >= 0).all(1) if which else jnp.zeros(len(g), bool)
    if momentum == "update":
      s = s._replace(graft_momentum=c["b1"] * s.graft_momentum + (1 - c["b1"]) * step)
    else:
      ready_B &= c["t"] >= start
    p = jnp.where(per_block(ready_B, p), p, step)
    return s, p, ready_B[:, None] * jnp.stack([_squares(step), _squares(p)], 1), ready_B

  return optax.GradientTransformation(init, update)


@factory.static_integers
def shampoo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  b1: float = 0.9,
  b2: float = 1.0,
  eps: float = 1e-12,
  eps_mode: str = "absolute",
  weight_decay: float = 0.0,
  bias_correction: bool = True,
  grafting: str = "none",
  graft_granularity: str = "block",
  grafting_b2: float = 0.999,
  grafting_eps: float = 1e-10,
  momentum: str = "gradient",
  root: str = "eigh",
  exponent: float | None = None,
  max_residual: float = 0.1,
  precondition_frequency: int = 1,
  refresh: str = "together",
  start_step: int | None = None,
  block_size: int = 1024,
  long_axes: str = "block",
  merge_dims: bool = False,
  preconditioner_dtype: str = "float32",
  packed: bool = False,
  eigenvalue_correction: bool = False,
) -> optax.GradientTransformation:
  """Distributed Shampoo with decoupled weight decay (arXiv 2309.06497, algorithm 2).

  b1, b2: decays of the momentum and of the factors G Gᵀ; b2 = 1 sums them.
  eps: added to a factor's eigenvalues; if eps_mode is "relative", times the largest of them, and
    factors start at eps·I (Google).
  bias_correction: of momentum, factors and Adam's second moment (Meta); False: of none (Google).
  grafting: none | sgd | adam | rmsprop, whose step length every block ("block", Meta) or every
    slice of a parameter ("parameter", Google) is given; before start_step, and for blocks without
    roots, its step itself is taken. Without grafting those take a plain average of gradients, which
    is on another scale.
  momentum: "gradient" averages what is preconditioned (Meta); "update" what has been, and grafted
    (Google, two buffers).
  root, exponent: row of roots.ROOTS; a factor is taken to -exponent, by default 1/4 for matrices
    and 1/2 for vectors.
  max_residual: a root above it, or not finite, is refused: the block keeps its old one, counted in
    the state.
  precondition_frequency, refresh, start_step: steps between roots; "together" (Meta: at multiples
    of the frequency from start_step, which is the frequency by default), "together_from_first"
    (Google: at steps 1, 1 + frequency, ...), or "staggered": from start_step on each block has its
    own step, so that none pays for all.
  block_size, long_axes: longer axes are cut into blocks ("block"), or go without a factor ("skip").
  merge_dims: parameters of at most block_size numbers are vectors (Meta's default; a trap for small
    matrices).
  preconditioner_dtype, packed: how factors and roots are kept: float32 | bfloat16 (b2 up to 0.99),
    whole or as triangles.
  eigenvalue_correction: Adam in the factors' eigenbasis instead of roots (eigenvalue_corrected.py);
    `exponent` is then of its second moment, by default 1/2, and what roots and grafting need stays
    at this function's defaults.

  State, bytes a number of an m x n block in float32: 4 (momentum) + 4 (adam, rmsprop) + 8 (m² + n²)
  / mn; packed or bfloat16 halve the last term."""
  shared: dict[str, Any] = dict(
    axes=axes,
    mesh=mesh,
    b1=b1,
    b2=b2,
    eps=eps,
    bias_correction=bias_correction,
    precondition_frequency=precondition_frequency,
    refresh=refresh,
    start_step=start_step,
    block_size=block_size,
    long_axes=long_axes,
    merge_dims=merge_dims,
  )
  own: dict[str, Any] = dict(
    eps_mode=eps_mode,
    grafting=grafting,
    momentum=momentum,
    root=root,
    preconditioner_dtype=preconditioner_dtype,
    packed=packed,
  )
  if eigenvalue_correction:
    for name, value in WITH_EIGENVALUE_CORRECTION.items():
      if own[name] != value:
        raise ValueError(f"{name} = {own[name]!r}: eigenvalue_correction works with {value!r} only")
    direction = scale_by_eigenvalue_corrected_shampoo(
      **shared, exponent=0.5 if exponent is None else exponent
    )
  else:
    direction = scale_by_shampoo(
      **shared,
      **own,
      graft_granularity=graft_granularity,
      grafting_b2=grafting_b2,
      grafting_eps=grafting_eps,
      exponent=exponent,
      max_residual=max_residual,
    )
  return optax.chain(
    direction, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
  )


def _order_of_root(exponent: float | None, order: int) -> float:
  """p of A^(-1/p), by default twice the number of axes of a block."""
  return 2.0 * order if exponent is None else 1 / exponent


def _squares(x: jax.Array) -> jax.Array:
  return jnp.sum(x * x, tuple(range(1, x.ndim)))
