"""Averages of a run's parameters: a moving average, and the mean of its last checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from absl import logging

from beyond_outliers import params as params_lib
from beyond_outliers.errors import CheckpointError
from beyond_outliers.types import Json, Params

if TYPE_CHECKING:
  from beyond_outliers.checkpoint import Checkpoints


def moved_average(average: Params, params: Params, updates: jax.Array, decay: float) -> Params:
  """The mean of the parameters after updates 1 to n = `updates`, weighted by decay^(n - i).

  params: the parameters after update n. average: this mean after update n - 1. It is the temporal
  averaging of arXiv 1412.6980, section 7.2, stored debiased so that it can be used as it is."""
  newest = (1 - decay) / -jnp.expm1(jnp.float32(updates) * math.log(decay))
  return optax.incremental_update(params, average, newest)


def evaluation_of_last(
  count: int, shapes: Params, evaluate: Callable[[Params], Json], checkpoints: Checkpoints
) -> Callable[[Params], Json]:
  """A function from the last step's parameters to metrics of the mean of the last `count` intact
  checkpoints, and their number. The parameters, which will be saved next, count as the newest.

  shapes: ShapeDtypeStructs of the parameters, with shardings."""

  def newest(params: Params) -> Iterator[Params]:
    yield params
    found = 1
    for step in checkpoints.lasting_steps()[::-1]:
      if found == count:
        return
      try:
        _, earlier = checkpoints.restore_params(shapes, step)
      except CheckpointError as error:  # must not prevent the next checkpoint from being saved
        logging.warning("the mean of the last checkpoints leaves one out: %s", error)
      else:
        found += 1
        yield earlier

  def evaluate_last(params: Params) -> Json:
    checkpoints.wait()
    mean, found = params_lib.mean(newest(params))
    return {**evaluate(mean), "checkpoints": found}

  return evaluate_last
