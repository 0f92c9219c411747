"""SOAP (arXiv 2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's factors, which changes
every few steps.

Between changes the first moment stays in the basis: to rotate it there and back at every step would
change nothing.

Legend: B blocks on this device, M and N axes of a block, D the axis of a basis, A rotated axes of a
block.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.ops import linalg
from beyond_outliers.optim import blocks, factory
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.linalg.inverse_root import orthogonal_iteration
from beyond_outliers.optim.linalg.kronecker import add_gram, along, per_block
from beyond_outliers.optim.refresh import staggered, together


class BlocksState(NamedTuple):
  """What a bucket of blocks carries; the stack axis comes first in every array."""

  momentum: jax.Array  # [B, *block] of gradients, in the basis
  second_moment: jax.Array  # [B, *block] of gradients in the basis
  factors: tuple[jax.Array, ...]  # one a rotated axis, [B, D, D]: averages of G Gᵀ
  bases: tuple[
    jax.Array, ...
  ]  # likewise: columns are eigenvectors, the identity until there are some
  age: Any  # [B, A] steps since the basis in use was computed; -1: never; () without bases
  kept: Any  # [B, A] bases refused so far, because not finite; likewise


class SoapState(NamedTuple):
  count: jax.Array  # int32: updates done; the first only initialises
  blocks: dict[str, BlocksState]


def scale_by_soap(
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  b1: float = 0.95,
  b2: float = 0.95,
  shampoo_beta: float | None = None,
  eps: float = 1e-8,
  precondition_frequency: int = 10,
  refresh: str = "together",
  max_dim: int = 10000,
  block_size: int | None = None,
  normalize_gradients: bool = False,
  bias_correction: bool = True,
  count_skipped_step: bool = False,
) -> optax.GradientTransformation:
  """SOAP's direction, to be subtracted; `soap` has the arguments' meaning."""
  factory.one_of("refresh", refresh, ("together", "staggered"))
  if precondition_frequency < 1:
    raise ValueError(
      f"precondition_frequency = {precondition_frequency}: expected at least 1 step between bases"
    )
  if max_dim < 0:
    raise ValueError(
      f"max_dim = {max_dim}: expected the longest axis to rotate, or 0 for none, which is Adam"
    )
  if block_size is not None and block_size < 1:
    raise ValueError(f"block_size = {block_size}: expected at least 1, or None for whole matrices")
  layout_of = functools.partial(blocks.layout, axes=axes, mesh=mesh, block_size=block_size)

  def rotated(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis, length in enumerate(shape) if len(shape) == 2 and length <= max_dim)

  def init(params):
    layout = layout_of(params)
    of = lambda bucket: first_state(bucket, rotated(bucket.shape), layout.dtype)
    return SoapState(
      jnp.zeros((), jnp.int32), {name: of(bucket) for name, bucket in layout.buckets.items()}
    )

  def update(updates, state, params=None):
    del params
    layout = layout_of(updates)
    count = state.count + 1
    step = count if count_skipped_step else state.count
    floats = {
      "b1": b1,
      "b2": b2,
      "shampoo_beta": b2 if shampoo_beta is None else shampoo_beta,
      "eps": eps,
    }
    common = {name: jnp.asarray(value, layout.dtype) for name, value in floats.items()}
    numbers = layout.numbers()

    def advance(given, common):
      return {
        name: one_bucket(g, s, number_B, common, rotated(layout.buckets[name].shape))
        for name, (g, s, number_B) in given.items()
      }

    done = layout.local(advance)(
      {name: (g, state.blocks[name], numbers[name]) for name, g in layout.stack(updates).items()},
      common | {"first": count == 1, "step": step},
    )
    new = {name: s for name, (s, _) in done.items()}
    directions = {name: direction for name, (_, direction) in done.items()}
    if normalize_gradients:
      squares = layout.sum_over_slices(
        {name: jnp.sum(d * d, tuple(range(1, d.ndim))) for name, d in directions.items()}
      )
      sizes = layout.constants(lambda leaf: math.prod(leaf.size))
      for name, d in directions.items():
        rms_B = jnp.sqrt(squares[name] / jnp.maximum(sizes[name], 1))
        directions[name] = d / (per_block(rms_B, d) + 1e-30)
    scale = jnp.ones((), layout.dtype)
    if bias_correction:
      scale = jnp.sqrt(1 - common["b2"] ** step) / (1 - common["b1"] ** step)
    directions = {name: jnp.where(count == 1, 0, scale * d) for name, d in directions.items()}
    return layout.unstack(directions, updates), SoapState(count, new)

  def one_bucket(
    g: jax.Array,
    s: BlocksState,
    number_B: jax.Array,
    c: dict[str, jax.Array],
    which: tuple[int, ...],
  ):
    """-> (state, direction)."""
    average = lambda decay, mean, x: jnp.where(c["first"], mean, decay * mean + (1 - decay) * x)
    seen = rotate(g, s.bases, which)
    momentum, second_moment = (
      average(c["b1"], s.momentum, seen),
      average(c["b2"], s.second_moment, seen * seen),
    )
    direction = rotate(momentum / (jnp.sqrt(second_moment) + c["eps"]), s.bases, which, back=True)

    beta = c["shampoo_beta"]
    factors = tuple(
      add_gram(factor, g, axis, beta, 1 - beta)
      for factor, axis in zip(s.factors, which, strict=True)
    )
    s = s._replace(momentum=momentum, second_moment=second_moment, factors=())
    if which:
      begin, improve = (
        functools.partial(_begin, which=which),
        functools.partial(_improve, which=which),
      )

      def later(s, factors):
        if refresh == "staggered":
          return staggered(s, number_B, c["step"], precondition_frequency, improve, factors)
        return together(s, c["step"] % precondition_frequency == 0, improve, factors)

      s = jax.lax.cond(c["first"], begin, later, grown_older(s), factors)
    return s._replace(factors=factors), direction

  return optax.GradientTransformation(init, update)


@factory.static_integers
def soap(
  learning_rate: optax.ScalarOrSchedule,
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  b1: float = 0.95,
  b2: float = 0.95,
  shampoo_beta: float | None = None,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  precondition_frequency: int = 10,
  refresh: str = "together",
  max_dim: int = 10000,
  block_size: int | None = None,
  normalize_gradients: bool = False,
  bias_correction: bool = True,
  count_skipped_step: bool = False,
) -> optax.GradientTransformation:
  """SOAP as its authors have it (nikhilvyas/SOAP, a1e5535): the first update only finds the bases,
  and moves nothing.

  b1, b2: decays of the first and the second moment; shampoo_beta: of the factors G Gᵀ, b2 if None
    (the official -1).
  eps: added to the root of the second moment, before its bias is corrected.
  weight_decay: decoupled; shrinks, by the learning rate itself, what the step has made.
  precondition_frequency, refresh: steps between bases: "together" (official, at multiples of the
    frequency), or "staggered", where each block has its own step, so that none pays for all.
  max_dim: longer axes are not rotated; vectors and scalars never are, which is Adam.
  block_size: longer axes are cut into blocks with bases of their own; None: they are not.
  normalize_gradients: every slice's step has an RMS of 1 before bias correction.
  count_skipped_step: the first update counts, in bias correction and in when bases are due, as in
    pytorch_optimizer.

  State, bytes a number of an m x n block in float32: 8 + 8 (m² + n²) / mn, without the terms of
  axes that are not rotated."""
  direction = scale_by_soap(
    axes=axes,
    mesh=mesh,
    b1=b1,
    b2=b2,
    shampoo_beta=shampoo_beta,
    eps=eps,
    precondition_frequency=precondition_frequency,
    refresh=refresh,
    max_dim=max_dim,
    block_size=block_size,
    normalize_gradients=normalize_gradients,
    bias_correction=bias_correction,
    count_skipped_step=count_skipped_step,
  )
  return optax.chain(
    direction,
    optax.scale_by_learning_rate(learning_rate),
    _decay_afterwards(learning_rate, weight_decay),
  )


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
    decay = lambda u, w: (u - shrink * (w + u)).astype(u.dtype)
    return jax.tree.map(decay, updates, params), DecayState(state.count + 1)

  return optax.GradientTransformation(init, update)


def _begin(s: BlocksState, factors: tuple[jax.Array, ...], which: tuple[int, ...]) -> BlocksState:
  """The first bases: eigenvectors, by descending eigenvalue. There are no moments yet."""
  ridge = lambda factor: 1e-30 * jnp.eye(factor.shape[-1], dtype=factor.dtype)
  return change_bases(
    s, tuple(linalg.eigh(factor + ridge(factor))[1][:, :, ::-1] for factor in factors), which
  )[0]


def _improve(s: BlocksState, factors: tuple[jax.Array, ...], which: tuple[int, ...]) -> BlocksState:
  """Bases one orthogonal iteration further. The second moment is not rotated: its entries follow
  their eigenvalues."""
  bases, _, orders = zip(*map(orthogonal_iteration, factors, s.bases), strict=True)
  s, ok_BxA = change_bases(s, bases, which)
  for i, axis in enumerate(which):
    order_BxD = jnp.where(ok_BxA[:, i : i + 1], orders[i], jnp.arange(orders[i].shape[1]))
    second_moment = jnp.take_along_axis(
      s.second_moment, jnp.expand_dims(order_BxD, 2 - axis), axis + 1
    )
    s = s._replace(second_moment=second_moment)
  return s


def first_state(bucket: blocks.Bucket, which: tuple[int, ...], dtype: Any) -> BlocksState:
  """Of a bucket whose axes `which` are to be rotated."""
  zeros = lambda *shape: jnp.zeros((bucket.padded, *shape), dtype)
  identity = lambda d: jnp.broadcast_to(jnp.eye(d, dtype=dtype), (bucket.padded, d, d))
  # Orbax saves no empty arrays: without a basis there is none.
  numbers = lambda value: jnp.full((bucket.padded, len(which)), value, jnp.int32) if which else ()
  lengths = [bucket.shape[axis] for axis in which]
  return BlocksState(
    zeros(*bucket.shape),
    zeros(*bucket.shape),
    tuple(zeros(d, d) for d in lengths),
    tuple(identity(d) for d in lengths),
    numbers(-1),
    numbers(0),
  )


def grown_older(s: BlocksState) -> BlocksState:
  """With bases that are a step older."""
  return s._replace(age=jnp.where(s.age < 0, -1, s.age + 1))


def change_bases(
  s: BlocksState, bases: tuple[jax.Array, ...], which: tuple[int, ...]
) -> tuple[BlocksState, jax.Array]:
  """-> (the state, its first moment too, in those of the bases [B, D, D] that are finite; which are
  [B, A]). Others stay."""
  ok_BxA = jnp.stack([jnp.isfinite(basis).all((1, 2)) for basis in bases], 1)
  chosen = tuple(
    jnp.where(per_block(ok_B, new), new, old)
    for ok_B, new, old in zip(ok_BxA.T, bases, s.bases, strict=True)
  )
  momentum = rotate(rotate(s.momentum, s.bases, which, back=True), chosen, which)
  return s._replace(
    momentum=momentum, bases=chosen, age=jnp.where(ok_BxA, 0, s.age), kept=s.kept + ~ok_BxA
  ), ok_BxA


def rotate(
  x: jax.Array, bases: tuple[jax.Array, ...], which: tuple[int, ...], *, back: bool = False
) -> jax.Array:
  """[B, *block] with the axes `which` of a block taken into their bases [B, D, D], or out of
  them."""
  for basis, axis in zip(bases, which, strict=True):
    x = along(axis, basis, x, transposed=not back)
  return x
