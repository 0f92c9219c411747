"""Functions of one matrix, mapped over stacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

CHUNK = 2**22  # elements processed at a time: bounds temporary memory


def in_chunks(function: Callable[..., Any], *trees: Any) -> Any:
  """`function` mapped over the first axis of all arrays, in chunks of at most `CHUNK` elements of
  the first array, or of one block if that is larger."""
  count, *shape = jax.tree.leaves(trees)[0].shape
  together = max(
    k for k in range(1, count + 1) if count % k == 0 and (k == 1 or k * math.prod(shape) <= CHUNK)
  )
  chunks = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), trees)
  done = jax.lax.map(lambda chunk: jax.vmap(function)(*chunk), chunks)
  return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), done)
