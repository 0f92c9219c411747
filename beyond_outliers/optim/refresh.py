"""When blocks renew what is costly to renew, roots or bases: all at once as the references do, or a
few at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A tree of arrays with the stack axis first.
Blocks = Any
Renew = Callable[[Blocks, Blocks], Blocks]


def together(blocks: Blocks, due: jax.Array, renew: Renew, given: Blocks) -> Blocks:
  """renew(blocks, given) if due, else blocks. given: what is only read, with the same stack
  axis."""
  return jax.lax.cond(due, renew, lambda blocks, given: blocks, blocks, given)


def staggered(
  blocks: Blocks, number_B: jax.Array, step: jax.Array, period: int, renew: Renew, given: Blocks
) -> Blocks:
  """Every block once in `period` steps: those at which step - number is a multiple of it.

  number_B: consecutive, as Layout.numbers has them: over all buckets, no step gets two blocks more
  than another, and the schedule is the same on any number of devices. Call it under
  Layout.local."""
  count = number_B.shape[0]
  rounds, rest = divmod(count, period)
  first = (step - number_B[0]) % period  # the first place that is due
  # Blocks are put back one by one, in place: anything else would copy all.
  put = lambda blocks, place, new: jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, place, 0), blocks, new
  )
  if rounds:
    places = first + period * jnp.arange(rounds)
    pick = lambda x: x[places]
    renewed = renew(jax.tree.map(pick, blocks), jax.tree.map(pick, given))
    blocks = jax.lax.fori_loop(
      0,
      rounds,
      lambda i, blocks: put(blocks, places[i], jax.tree.map(lambda x: x[i], renewed)),
      blocks,
    )
  if rest:
    # Only one block goes through the conditional. If it isn't due, it is put back as it was.
    place = jnp.minimum(rounds * period + first, count - 1)
    pick = lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1)
    renewed = together(jax.tree.map(pick, blocks), first < rest, renew, jax.tree.map(pick, given))
    blocks = put(blocks, place, jax.tree.map(lambda x: x[0], renewed))
  return blocks


def together_from_start(
  blocks: Blocks,
  number_B: jax.Array,
  step: jax.Array,
  start: int,
  period: int,
  renew: Renew,
  given: Blocks,
) -> Blocks:
  """At `start`, and at multiples of the period after it."""
  del number_B
  return together(blocks, (step == start) | (step > start) & (step % period == 0), renew, given)


def together_from_first(
  blocks: Blocks,
  number_B: jax.Array,
  step: jax.Array,
  start: int,
  period: int,
  renew: Renew,
  given: Blocks,
) -> Blocks:
  """At steps 1, 1 + period, ..., whatever `start`."""
  del number_B, start
  return together(blocks, (step - 1) % period == 0, renew, given)


def staggered_from_start(
  blocks: Blocks,
  number_B: jax.Array,
  step: jax.Array,
  start: int,
  period: int,
  renew: Renew,
  given: Blocks,
) -> Blocks:
  return together(
    blocks,
    step >= start,
    lambda blocks, given: staggered(blocks, number_B, step, period, renew, given),
    given,
  )


# (blocks, their numbers, step from 1, first step with roots or bases, steps between them, renew,
# given) -> blocks
REFRESHES: dict[str, Callable[..., Blocks]] = {
  "together": together_from_start,
  "together_from_first": together_from_first,
  "staggered": staggered_from_start,
}
