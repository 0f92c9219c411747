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


def staggered(blocks: Blocks, step: jax.Array, period: int, phase: int, renew: Callable[[Blocks, Blocks], Blocks],
              given: Blocks) -> Blocks:
  """Every block once in `period` steps, as evenly as they can be dealt.

  Of B blocks, B // period are renewed at every step, as one batch; each of the B % period that are left has a step of its
  own, the first at (step + phase) % period == 0: give the next bucket a phase that moves on by that remainder, and no step
  gets two. B is the number on this device: call it under Layout.local."""
  count = jax.tree.leaves(blocks)[0].shape[0]
  rounds, rest = divmod(count, period)
  if rounds:
    # As [rounds, period, ...], a step renews one column.
    column = step % period
    grid = lambda x: x[: rounds * period].reshape(rounds, period, *x.shape[1:])
    pick = lambda x: jax.lax.dynamic_index_in_dim(grid(x), column, axis=1, keepdims=False)
    renewed = renew(jax.tree.map(pick, blocks), jax.tree.map(pick, given))

    def put(x, new):
      placed = jax.lax.dynamic_update_index_in_dim(grid(x), new, column, axis=1).reshape(rounds * period, *x.shape[1:])
      return jnp.concatenate([placed, x[rounds * period:]]) if rest else placed
    blocks = jax.tree.map(put, blocks, renewed)
  if rest:
    turn = (step + phase) % period
    slot = rounds * period + turn

    def one(blocks, given):
      pick = lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1)
      renewed = renew(jax.tree.map(pick, blocks), jax.tree.map(pick, given))
      return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0), blocks, renewed)
    blocks = jax.lax.cond(turn < rest, one, lambda blocks, given: blocks, blocks, given)
  return blocks
