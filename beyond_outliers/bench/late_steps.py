"""The steps of one optimizer period late in a run: the FLOPs of the traced update, and which parts
of the state each step renews."""

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
  renewed: list[bool]  # of each leaf of the state, whether it isn't handed back as it came


def late_steps(
  update: core.ClosedJaxpr, state: Any, period: int, devices: int = 1, **how: Any
) -> list[LateStep]:
  """Each of the `period` steps after which costs repeat.

  update: traced, (gradients, state, params) -> (updates, state).
  state: arrays, or their shapes and types.
  devices, how: as `jaxpr_flops.count_flops` takes them."""
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
  """A leaf of an optimizer's state as late in a run: STEADY of a counter, `other` of another."""
  counts = x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
  return np.asarray(STEADY, x.dtype) if counts else other
