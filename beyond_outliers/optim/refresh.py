"""Refresh schedules for roots and eigenbases: all blocks at once, or a few at every step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A tree of arrays with the stack axis first.
Blocks = Any
Renew = Callable[[Blocks, Blocks], Blocks]


def together(blocks: Blocks, due: jax.Array, renew: Renew, given: Blocks) -> Blocks:
  """renew(blocks, given) if due, else blocks.

  given: read-only arrays with the same stack axis."""
  return jax.lax.cond(due, renew, lambda blocks, given: blocks, blocks, given)


def staggered(
  blocks: Blocks, id_B: jax.Array, step: jax.Array, period: int, renew: Renew, given: Blocks
) -> Blocks:
  """Renews each block once in `period` steps: when step - id is a multiple of the period.

  id_B: consecutive, as from Layout.block_ids: over all buckets, the numbers of blocks that two
  steps renew differ by at most one, and the schedule is the same on any number of devices. Call
  this under Layout.on_each_device."""
  count = id_B.shape[0]
  rounds, rest = divmod(count, period)
  first = (step - id_B[0]) % period  # index of the first block that is due
  if rounds:
    places = first + period * jnp.arange(rounds)
    renewed = renew(_at(blocks, places), _at(given, places))
    blocks = jax.lax.fori_loop(
      0, rounds, lambda i, blocks: _put(blocks, places[i], _at(renewed, i)), blocks
    )
  if rest:
    # Only one block passes through the conditional; if it isn't due, it returns unchanged.
    place = jnp.minimum(rounds * period + first, count - 1)
    pick = functools.partial(jax.tree.map, lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1))
    renewed = together(pick(blocks), first < rest, renew, pick(given))
    blocks = _put(blocks, place, _at(renewed, 0))
  return blocks


def _at(blocks: Blocks, places: Any) -> Blocks:
  return jax.tree.map(lambda x: x[places], blocks)


def _put(blocks: Blocks, place: jax.Array, new: Blocks) -> Blocks:
  """`blocks` with one of them replaced in place; any other way would copy them all."""
  return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, place, 0), blocks, new)


def together_from_start(
  blocks: Blocks,
  id_B: jax.Array,
  step: jax.Array,
  start: int,
  period: int,
  renew: Renew,
  given: Blocks,
) -> Blocks:
  """Renews all blocks at `start`, and at multiples of the period after it."""
  del id_B
  return together(blocks, (step == start) | (step > start) & (step % period == 0), renew, given)


def together_from_first(
  blocks: Blocks,
  id_B: jax.Array,
  step: jax.Array,
  start: int,
  period: int,
  renew: Renew,
  given: Blocks,
) -> Blocks:
  """Renews all blocks at steps 1, 1 + period, ...; ignores `start`."""
  del id_B, start
  return together(blocks, (step - 1) % period == 0, renew, given)


def staggered_from_start(
  blocks: Blocks,
  id_B: jax.Array,
  step: jax.Array,
  start: int,
  period: int,
  renew: Renew,
  given: Blocks,
) -> Blocks:
  def renew_some(blocks: Blocks, given: Blocks) -> Blocks:
    return staggered(blocks, id_B, step, period, renew, given)

  return together(blocks, step >= start, renew_some, given)


# (blocks, ids, step counted from 1, first step with roots, period, renew, given) -> blocks
REFRESHES: dict[str, Callable[..., Blocks]] = {
  "together": together_from_start,
  "together_from_first": together_from_first,
  "staggered": staggered_from_start,
}
