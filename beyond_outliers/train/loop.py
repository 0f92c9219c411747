"""Training loop: steps and hooks, the clock of training time, and the way to end early.

Everything that a run reads or writes during training happens in a hook, outside jit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from beyond_outliers.train.step import TrainState
from beyond_outliers.types import Batch, Metrics

Hook = Callable[[int, TrainState, Metrics], None]


class Stop(Exception):
  """Raised by a hook to end the run early after `step`; `status` and `reason` go to status.json."""

  def __init__(self, status: str, step: int, reason: str):
    super().__init__(reason)
    self.status, self.step, self.reason = status, step, reason


def fit(
  step_fn: Callable[..., tuple[TrainState, Metrics]],
  state: TrainState,
  batches: Iterator[Batch],
  hooks: Sequence[Hook],
  num_steps: int,
) -> TrainState:
  """Trains to `num_steps`. The state is donated to the next step, so hooks copy what they keep."""
  for step in range(int(state.step) + 1, num_steps + 1):
    state, metrics = step_fn(state, next(batches))
    for hook in hooks:
      hook(step, state, metrics)
  return state


def due(step: int, every: int, num_steps: int) -> bool:
  """True for steps that are multiples of `every`, and for the last."""
  return step % every == 0 or step == num_steps


class Clock:
  """Seconds spent training, over all starts of a run; evaluation and checkpoints don't count."""

  def __init__(self, seconds: float = 0.0):
    self._before = seconds
    self._start: float | None = time.perf_counter()  # None while paused

  def seconds(self) -> float:
    return self._before + (time.perf_counter() - self._start if self._start is not None else 0.0)

  @contextlib.contextmanager
  def paused(self, metrics: Metrics) -> Iterator[None]:
    """Stops counting once the step that made `metrics` is done."""
    jax.block_until_ready(metrics)
    self._before, self._start = self.seconds(), None
    try:
      yield
    finally:
      self._start = time.perf_counter()
