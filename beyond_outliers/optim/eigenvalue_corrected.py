"""Eigenvalue-corrected Shampoo (Meta's; arXiv 2506.03595): Adam in the eigenbasis of the factors,
which is what SOAP is too.

Unlike SOAP it starts in the identity instead of skipping a step, renews a basis before it is used,
by a whole eigendecomposition, and leaves the second moment as it is when the basis changes.

Legend: B blocks on this device, D the axis of a basis.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.ops import linalg
from beyond_outliers.optim import blocks, factory
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.linalg.kronecker import add_gram
from beyond_outliers.optim.refresh import REFRESHES
from beyond_outliers.optim.soap import BlocksState, change_bases, first_state, grown_older, rotate


class EigenvalueCorrectedState(NamedTuple):
  count: jax.Array  # int32: updates done
  blocks: dict[str, BlocksState]


def scale_by_eigenvalue_corrected_shampoo(
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  b1: float = 0.9,
  b2: float = 1.0,
  eps: float = 1e-12,
  exponent: float = 0.5,
  bias_correction: bool = True,
  precondition_frequency: int = 1,
  refresh: str = "together",
  start_step: int | None = None,
  block_size: int = 1024,
  long_axes: str = "block",
  merge_dims: bool = False,
) -> optax.GradientTransformation:
  """The direction, to be subtracted (facebookresearch/optimizers,
  EigenvalueCorrectedShampooPreconditionerList with eigh).

  b1, b2: decays of the momentum, and of factors and second moment; b2 = 1 sums these.
  eps: added to the second moment's power `exponent`, after its bias is corrected.
  precondition_frequency, refresh, start_step, block_size, long_axes, merge_dims: as of `shampoo`;
    until start_step this is Adam.

  State: as of `soap`; vectors have a factor too."""
  factory.one_of("refresh", refresh, ("together", "staggered"))
  factory.one_of("long_axes", long_axes, ("block", "skip"))
  for name, value in (
    ("precondition_frequency", precondition_frequency),
    ("block_size", block_size),
  ):
    if value < 1:
      raise ValueError(f"{name} = {value}: expected at least 1")
  start = precondition_frequency if start_step is None else start_step
  layout_of = functools.partial(
    blocks.layout,
    axes=axes,
    mesh=mesh,
    block_size=block_size if long_axes == "block" else None,
    merge_up_to=block_size if merge_dims else 0,
  )

  def rotated(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis, length in enumerate(shape) if length <= block_size)

  def init(params):
    layout = layout_of(params)
    of = lambda bucket: first_state(bucket, rotated(bucket.shape), layout.dtype)
    return EigenvalueCorrectedState(
      jnp.zeros((), jnp.int32), {name: of(bucket) for name, bucket in layout.buckets.items()}
    )

  def update(updates, state, params=None):
    del params
    layout = layout_of(updates)
    count = state.count + 1
    floats = {"b1": b1, "b2": b2, "eps": eps, "exponent": exponent}
    common = {name: jnp.asarray(value, layout.dtype) for name, value in floats.items()} | {
      "t": count
    }
    numbers = layout.numbers()

    def advance(given, common):
      return {
        name: one_bucket(g, s, number_B, common, rotated(layout.buckets[name].shape))
        for name, (g, s, number_B) in given.items()
      }

    given = {
      name: (g, state.blocks[name], numbers[name]) for name, g in layout.stack(updates).items()
    }
    done = layout.local(advance)(given, common)
    new = {name: s for name, (s, _) in done.items()}
    directions = {name: direction for name, (_, direction) in done.items()}
    return layout.unstack(directions, updates), EigenvalueCorrectedState(count, new)

  def one_bucket(
    g: jax.Array,
    s: BlocksState,
    number_B: jax.Array,
    c: dict[str, jax.Array],
    which: tuple[int, ...],
  ):
    """-> (state, direction)."""
    # A decay of 1 sums instead of averaging, and needs no correction.
    weight = jnp.where(c["b2"] < 1, 1 - c["b2"], 1)
    correction = lambda decay: (
      jnp.where(decay < 1, 1 - decay ** c["t"], 1) if bias_correction else 1
    )
    factors = tuple(
      add_gram(factor, g, axis, c["b2"], weight)
      for factor, axis in zip(s.factors, which, strict=True)
    )

    def renew(s, factors):
      return change_bases(s, tuple(linalg.eigh(factor)[1] for factor in factors), which)[0]

    s = s._replace(factors=())
    if which:
      s = REFRESHES[refresh](
        grown_older(s), number_B, c["t"], start, precondition_frequency, renew, factors
      )

    seen = rotate(g, s.bases, which)
    momentum, second_moment = (
      c["b1"] * s.momentum + (1 - c["b1"]) * seen,
      c["b2"] * s.second_moment + weight * seen * seen,
    )
    divisor = (second_moment / correction(c["b2"])) ** c["exponent"] + c["eps"]
    direction = rotate(momentum / correction(c["b1"]) / divisor, s.bases, which, back=True)
    return s._replace(momentum=momentum, second_moment=second_moment, factors=factors), direction

  return optax.GradientTransformation(init, update)
