"""Optax transformations over blocks, shared by Muon, spectral Scion, PSGD, Shampoo and SOAP.

At every step gradients are stacked by block shape, each device computes the step of its own blocks,
bucket by bucket, and directions return to the parameters' layout (blocks.py). An optimizer only
defines the step of one bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.config.hyperparameters import Section
from beyond_outliers.optim.blocks import Bucket, Layout

ByBucket = dict[str, Any]


class State(NamedTuple):
  count: jax.Array  # int32: updates done
  blocks: ByBucket  # each a tree of arrays with the stack axis first


def first_state(blocks: ByBucket) -> State:
  return State(jnp.zeros((), jnp.int32), blocks)


def count_up(state: State) -> tuple[State, jax.Array]:
  count = state.count + 1
  return state._replace(count=count), count


def no_constants(layout: Layout) -> ByBucket:
  return dict.fromkeys(layout.buckets, ())


def directions_and_states(done: Mapping[str, tuple]) -> tuple[ByBucket, ByBucket]:
  """The first two results of each bucket's step, separated."""
  return {name: out[0] for name, out in done.items()}, {name: out[1] for name, out in done.items()}


def transformation(
  h: Section,
  layout_of: Callable[[Any], Layout],
  init_bucket: Callable[[Any, Bucket, np.dtype], Any],
  step: Callable[..., Any],
  *,
  traced: tuple[str, ...],
  constants: Callable[[Layout], ByBucket] = no_constants,
  start: Callable[[ByBucket], Any] = first_state,
  advance: Callable[[Any], tuple[Any, Any]] = count_up,
  finish: Callable[..., tuple[ByBucket, ByBucket]] | None = None,
) -> optax.GradientTransformation:
  """An optimizer's direction, to be subtracted, built from its step for one bucket.

  layout_of: a tree like the parameters -> its layout.
  init_bucket: (h, bucket, dtype of stacks) -> the state of the bucket's blocks, arrays [B, ...].
  step: (h, clock, gradients [B, *block], state, constants) -> (direction [B, *block], new state,
    and perhaps more for `finish`); each device calls it on its own blocks.
  traced: hyperparameters that are arrays, of the stacks' dtype, in the `h` of `step` and `finish`.
  constants: layout -> {bucket: a tree of arrays [B, ...]}, such as Layout.block_ids.
  start: states by bucket -> the whole state, a NamedTuple with a field `blocks`.
  advance: the whole state -> (it with its other fields a step further, clock: what blocks see of
    those).
  finish: (h, clock, layout, {bucket: what `step` returned}) -> directions and states by bucket; for
    work across blocks of several devices."""

  def init(params):
    layout = layout_of(params)
    return start(
      {name: init_bucket(h, bucket, layout.dtype) for name, bucket in layout.buckets.items()}
    )

  def update(updates, state, params=None):
    del params
    layout = layout_of(updates)
    state, clock = advance(state)
    arrays: dict[str, Any] = {name: jnp.asarray(getattr(h, name), layout.dtype) for name in traced}
    constant = constants(layout)
    given = {
      name: (gradients, state.blocks[name], constant[name])
      for name, gradients in layout.stack(updates).items()
    }
    done = layout.on_each_device(on_a_device)(given, (arrays, clock))
    if finish is None:
      directions, blocks = directions_and_states(done)
    else:
      directions, blocks = finish(dataclasses.replace(h, **arrays), clock, layout, done)
    return layout.unstack(directions, updates), state._replace(blocks=blocks)

  def on_a_device(given, common):
    arrays, clock = common
    h_traced = dataclasses.replace(h, **arrays)
    return {name: step(h_traced, clock, *of_bucket) for name, of_bucket in given.items()}

  return optax.GradientTransformation(init, update)
