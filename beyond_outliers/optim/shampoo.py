"""Distributed Shampoo (arXiv 1802.09568; 2309.06497): every axis of a block has a factor, whose
inverse root preconditions that axis.

With the default values this is Meta's implementation without grafting; each difference in Google's
has a switch.

Legend: B blocks on this device, D the axis of a factor, A preconditioned axes of a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.config.optimizers import Shampoo
from beyond_outliers.optim import blocks, blockwise, eigenvalue_corrected, factory, grafting
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.factored import bias_correction, factored_axes, first_refresh, layout
from beyond_outliers.optim.linalg import inverse_root, packing
from beyond_outliers.optim.linalg.kronecker import add_gram, along, broadcast_blocks
from beyond_outliers.optim.refresh import REFRESHES

Arrays = tuple[jax.Array, ...]


class Roots(NamedTuple):
  """Inverse roots of a bucket's factors, one per preconditioned axis: all that a refresh renews."""

  values: Arrays  # [B, D, D] or packed, float32 or bfloat16; the identity until one is computed
  bases: tuple[Any, ...]  # starting points of warm-started roots
  residual: Any  # [B, A] of the last root computed, whether accepted or refused
  condition: Any  # [B, A] of its factor: largest eigenvalue over the smallest with eps added
  age: Any  # [B, A] steps since the root in use was computed; -1: never
  kept: Any  # [B, A] roots refused so far, because not finite or of too large a residual


class BlocksState(NamedTuple):
  """State of a bucket of blocks; the stack axis comes first in every array."""

  momentum: jax.Array  # [B, *block] average of gradients, or of directions (momentum="update")
  graft_momentum: Any  # [B, *block] average of grafting steps, with momentum="update"; else ()
  second_moment: Any  # [B, *block] of the grafting method if it has one; else ()
  factors: Arrays  # one per preconditioned axis, [B, D, D] or packed, float32 or bfloat16
  roots: Roots


class Constants(NamedTuple):
  id_B: np.ndarray
  real_B: np.ndarray  # bool: not padding


@factory.arguments_of(
  Shampoo, without=("learning_rate", "weight_decay"), eigenvalue_correction=False
)
def scale_by_shampoo(
  h: Shampoo, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Shampoo's direction, to be subtracted."""
  return _direction(h, axes, mesh)


@factory.arguments_of(Shampoo)
def shampoo(
  h: Shampoo, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Distributed Shampoo with decoupled weight decay (arXiv 2309.06497, algorithm 2).

  A root that is not finite, or whose residual is too large, is refused and counted in the state.
  State, bytes per element of an m x n block in float32: 4 (momentum; 8 with momentum="update") + 4
  (grafting adam or rmsprop) + 8 (m² + n²) / mn; packed and bfloat16 each halve the last term, and
  root="qr" adds 4 (m² + n²) / mn."""
  of = eigenvalue_corrected.direction if h.eigenvalue_correction else _direction
  return optax.chain(
    of(h, axes, mesh),
    optax.add_decayed_weights(h.weight_decay),
    optax.scale_by_learning_rate(h.learning_rate),
  )


def _direction(
  h: Shampoo, axes: AxesTree, mesh: jax.sharding.Mesh | None
) -> optax.GradientTransformation:
  if isinstance(h.exponent, jax.Array):  # it chooses the iteration
    raise TypeError(
      "exponent: must be a Python number; give inject_hyperparams static_args='exponent'"
    )
  for order in (1, 2):
    inverse_root.check(h.root, _order_of_root(h, order))
  return blockwise.transformation(
    h,
    functools.partial(layout, h=h, axes=axes, mesh=mesh),
    _init_bucket,
    _step,
    traced=("b1", "b2", "eps", "grafting_b2", "grafting_eps", "max_residual"),
    constants=_constants,
    finish=_finish,
  )


def _constants(layout: blocks.Layout) -> dict[str, Constants]:
  ids = layout.block_ids()
  return {name: Constants(ids[name], bucket.real) for name, bucket in layout.buckets.items()}


def _init_bucket(h: Shampoo, bucket: blocks.Bucket, dtype: np.dtype) -> BlocksState:
  graft = grafting.GRAFTS[h.grafting]
  stored = packing.stored_dtype(h.preconditioner_dtype, dtype)
  first = h.eps if h.eps_mode == "relative" else 0.0
  warm = inverse_root.ROOTS[h.root].warm
  lengths = [bucket.shape[axis] for axis in factored_axes(h, bucket.shape)]

  def numbers(value: int, dtype: Any) -> Any:
    # Orbax cannot save empty arrays, so without factors there is no array.
    return jnp.full((bucket.padded, len(lengths)), value, dtype) if lengths else ()

  def store(a_BxDxD: jax.Array) -> jax.Array:
    return packing.to_storage(a_BxDxD, stored, h.packed)

  has_second_moment = graft is not None and graft.has_second_moment
  return BlocksState(
    momentum=bucket.zeros(*bucket.shape, dtype=dtype),
    graft_momentum=bucket.zeros(*bucket.shape, dtype=dtype) if h.momentum == "update" else (),
    second_moment=bucket.zeros(*bucket.shape, dtype=dtype) if has_second_moment else (),
    factors=tuple(store(first * bucket.identity(d, dtype)) for d in lengths),
    roots=Roots(
      values=tuple(store(bucket.identity(d, dtype)) for d in lengths),
      bases=tuple(bucket.zeros(d, d, dtype=dtype) if warm else () for d in lengths),
      residual=numbers(0, dtype),
      condition=numbers(0, dtype),
      age=numbers(-1, jnp.int32),
      kept=numbers(0, jnp.int32),
    ),
  )


def _step(
  h: Shampoo, count: jax.Array, g: jax.Array, s: BlocksState, constants: Constants
) -> tuple[jax.Array, BlocksState, jax.Array, jax.Array]:
  """(direction, state, squared lengths [B, 2] of the grafting step and of the direction, whether
  the direction is Shampoo's [B]).

  A block without roots takes the grafting method's own step, and does not count in the lengths of
  others."""
  t, axes = count.astype(g.dtype), factored_axes(h, g.shape[1:])
  factors = _accumulate_factors(h, g, s, axes)
  roots = _refresh_roots(h, count, t, factors, s.roots, constants, g.ndim - 1)
  pairs = zip(factors, s.factors, strict=True)
  stored = tuple(packing.to_storage(new, was.dtype, h.packed) for new, was in pairs)
  s = s._replace(factors=stored, roots=roots)

  averaged, s = _average_gradients(h, t, g, s)
  direction = _precondition(h, averaged, s.roots, axes)
  step, s = _graft_step(h, t, g, averaged, s)

  ready_B = (roots.age >= 0).all(1) if axes else jnp.zeros(len(g), bool)
  if h.momentum == "update":
    s = s._replace(graft_momentum=h.b1 * s.graft_momentum + (1 - h.b1) * step)
  else:
    ready_B &= count >= first_refresh(h)
  direction = jnp.where(broadcast_blocks(ready_B, direction), direction, step)
  return direction, s, grafting.squared_lengths(step, direction, ready_B), ready_B


def _accumulate_factors(h: Shampoo, g: jax.Array, s: BlocksState, axes: tuple[int, ...]) -> Arrays:
  """Factors [B, D, D] with the gradients' Gram matrices averaged in, or summed for a decay of 1."""
  weight = jnp.where(h.b2 < 1, 1 - h.b2, 1)
  return tuple(
    add_gram(
      packing.from_storage(factor, g.shape[1 + axis], g.dtype, h.packed), g, axis, h.b2, weight
    )
    for factor, axis in zip(s.factors, axes, strict=True)
  )


def _refresh_roots(
  h: Shampoo,
  count: jax.Array,
  t: jax.Array,
  factors: Arrays,
  roots: Roots,
  constants: Constants,
  order: int,
) -> Roots:
  """Roots of the factors, renewed for the blocks that are due. order: number of a block's axes."""
  if not factors:
    return roots
  norm = bias_correction(h, h.b2, t)

  def renew(old: Roots, given: tuple[Arrays, jax.Array]) -> Roots:
    factors, real_B = given
    columns = []
    for i, factor in enumerate(factors):
      new = inverse_root.ROOTS[h.root].compute(
        factor / norm,
        _order_of_root(h, order),
        h.eps,
        relative=h.eps_mode == "relative",
        basis=old.bases[i],
      )
      columns.append(_take_or_keep(h, new, old, i, real_B))
    values, bases, *numbers = zip(*columns, strict=True)
    return Roots(values, bases, *(jnp.stack(column, 1) for column in numbers))

  older = roots._replace(age=jnp.where(roots.age < 0, -1, roots.age + 1))
  return REFRESHES[h.refresh](
    older,
    constants.id_B,
    count,
    first_refresh(h),
    h.precondition_frequency,
    renew,
    (factors, constants.real_B),
  )


def _take_or_keep(
  h: Shampoo, new: inverse_root.Root, old: Roots, axis: int, real_B: jax.Array
) -> tuple[Any, ...]:
  """Fields of Roots for one preconditioned axis: where the new root is bad, the old one stays."""
  ok_B = jnp.isfinite(new.root).all((1, 2)) & (new.residual <= h.max_residual)

  def choose(new: jax.Array, was: jax.Array) -> jax.Array:
    return jnp.where(broadcast_blocks(ok_B, new), new, was)

  return (
    choose(packing.to_storage(new.root, old.values[axis].dtype, h.packed), old.values[axis]),
    jax.tree.map(choose, new.basis, old.bases[axis]),
    new.residual,
    new.condition,
    jnp.where(ok_B, 0, old.age[:, axis]),
    old.kept[:, axis] + (real_B & ~ok_B),
  )


def _average_gradients(
  h: Shampoo, t: jax.Array, g: jax.Array, s: BlocksState
) -> tuple[jax.Array, BlocksState]:
  """(what to precondition, state): the gradient if momentum="update", else its average."""
  if h.momentum == "update":
    return g, s
  average = h.b1 * s.momentum + (1 - h.b1) * g
  return average / bias_correction(h, h.b1, t), s._replace(momentum=average)


def _precondition(h: Shampoo, x: jax.Array, roots: Roots, axes: tuple[int, ...]) -> jax.Array:
  for root, axis in zip(roots.values, axes, strict=True):
    x = along(axis, packing.from_storage(root, x.shape[1 + axis], x.dtype, h.packed), x)
  return x


def _graft_step(
  h: Shampoo, t: jax.Array, g: jax.Array, averaged: jax.Array, s: BlocksState
) -> tuple[jax.Array, BlocksState]:
  """(the grafting method's own step, state)."""
  graft, v = grafting.GRAFTS[h.grafting], None
  if graft is None:
    return averaged, s
  if graft.has_second_moment:
    v = h.grafting_b2 * s.second_moment + (1 - h.grafting_b2) * g * g
    s = s._replace(second_moment=v)
    if graft.bias_correction and h.bias_correction:
      v = v / (1 - h.grafting_b2**t)
  return graft.direction(averaged, v, h.grafting_eps), s


def _finish(
  h: Shampoo, count: jax.Array, layout: blocks.Layout, done: dict[str, Any]
) -> tuple[blockwise.ByBucket, blockwise.ByBucket]:
  """Directions given the grafted lengths, and then averaged if momentum="update"."""
  directions, states = blockwise.directions_and_states(done)
  if h.grafting != "none":
    directions = grafting.give_lengths(
      layout,
      h.graft_granularity,
      directions,
      {name: out[2] for name, out in done.items()},
      {name: out[3] for name, out in done.items()},
    )
  if h.momentum == "update":
    for name, s in states.items():
      averaged = h.b1 * s.momentum + (1 - h.b1) * directions[name]
      states[name] = s._replace(momentum=averaged)
      directions[name] = jnp.where(count >= first_refresh(h), averaged, s.graft_momentum)
  return directions, states


def _order_of_root(h: Shampoo, order: int) -> float:
  """p of A^(-1/p), by default twice the number of a block's axes."""
  return 2.0 * order if h.exponent is None else 1 / h.exponent
