"""When blocks renew what is costly to renew, roots or bases: all at once as the references do, or a few at every step."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A tree of arrays with the stack axis first.
Blocks = Any


def together(blocks: Blocks, due: jax.Array, renew: Callable[[Blocks, Blocks], Blocks], given: Blocks) -> Blocks:
  """renew(blocks, given) if due, else blocks. given: what is only read, with the same stack axis."""
  return jax.lax.cond(due, renew, lambda blocks, given: blocks, blocks, given)


def staggered(blocks: Blocks, number_B: jax.Array, step: jax.Array, period: int, renew: Callable[[Blocks, Blocks], Blocks],
              given: Blocks) -> Blocks:
  """Every block once in `period` steps: those at which step - number is a multiple of it.

  number_B: consecutive, as Layout.numbers has them: over all buckets, no step gets two blocks more than another, and the
  schedule is the same on any number of devices. Call it under Layout.local."""
  count = number_B.shape[0]
  rounds, rest = divmod(count, period)
  first = (step - number_B[0]) % period                    # the first place that is due
  if rounds:
    # As [rounds, period, ...], a step renews one column.
    grid = lambda x: x[: rounds * period].reshape(rounds, period, *x.shape[1:])
    pick = lambda x: jax.lax.dynamic_index_in_dim(grid(x), first, axis=1, keepdims=False)
    renewed = renew(jax.tree.map(pick, blocks), jax.tree.map(pick, given))

    def put(x, new):
      placed = jax.lax.dynamic_update_index_in_dim(grid(x), new, first, axis=1).reshape(rounds * period, *x.shape[1:])
      return jnp.concatenate([placed, x[rounds * period:]]) if rest else placed
    blocks = jax.tree.map(put, blocks, renewed)
  if rest:
    # Only the one block goes through the conditional, which would copy the others. One that isn't due is put back.
    place = jnp.minimum(rounds * period + first, count - 1)
    pick = lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1)
    renewed = together(jax.tree.map(pick, blocks), first < rest, renew, jax.tree.map(pick, given))
    blocks = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, place, 0), blocks, renewed)
  return blocks
