"""Steps of one optimizer period late in a run: FLOPs of the traced update, and which parts of the
state each step renews."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from beyond_outliers.bench import jaxpr_flops

STEADY = 4000  # a step long after the first


class LateStep(NamedTuple):
  """One step of a period, counted."""

  flops: jaxpr_flops.Flops
  renewed: list[bool]  # for each leaf of the state, whether it is not returned unchanged


def late_steps(
  update: core.ClosedJaxpr, state: Any, period: int, devices: int = 1, **how: Any
) -> list[LateStep]:
  """The steps of one period, after which costs repeat.

  update: traced, (gradients, state, params) -> (updates, state).
  state: arrays, or their shapes and types.
  devices, how: see `jaxpr_flops.count_flops`."""
  leaves = jax.tree.leaves(state)
  others = (len(update.in_avals) - len(leaves)) // 2  # gradients, parameters and updates
  unknown, steps = [jaxpr_flops.UNKNOWN] * others, []
  before = [late(x, jaxpr_flops.Unknown()) for x in leaves]
  for _ in range(period):
    flops, outputs = jaxpr_flops.count_flops(update, [*unknown, *before, *unknown], devices, **how)
    after = outputs[others:]
    steps.append(LateStep(flops, [x is not y for x, y in zip(before, after, strict=True)]))
    before = [jaxpr_flops.Unknown() if isinstance(x, jaxpr_flops.Unknown) else x for x in after]
  return steps


def late(x: Any, other: Any) -> Any:
  """A leaf of an optimizer's state as it is late in a run: STEADY for a counter, else `other`."""
  counts = x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
  return np.asarray(STEADY, x.dtype) if counts else other
