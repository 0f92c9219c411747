"""Hooks of the training loop: logging, evaluation, checkpoints and preemption, profiles."""

from __future__ import annotations

import faulthandler
import operator
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from beyond_outliers import cli, config, hardware, mesh
from beyond_outliers.errors import NotFiniteError
from beyond_outliers.train.loop import Clock, Stop, due
from beyond_outliers.train.program import Statistics
from beyond_outliers.train.step import TrainState
from beyond_outliers.types import Batch, Json, Metrics, Params, PathLike
from beyond_outliers.workdir import Workdir
from beyond_outliers.writers import Writer

if TYPE_CHECKING:
  from beyond_outliers.checkpoint import Checkpoints


class LogMetrics:
  """Rows of metrics every `every` steps, fetched one step late so that the device never waits.

  Norms of the parameters and of their change, and the `statistics`, are a separate program, so that
  steps between rows don't pay for them. sample: the batch that `statistics` gets for every row."""

  def __init__(
    self,
    every: int,
    sinks: Sequence[Writer],
    clock: Clock,
    state: TrainState,
    *,
    tokens_per_step: int,
    flops_per_step: float,
    peak_flops: float,
    num_steps: int,
    max_skipped: int,
    statistics: Statistics | None = None,
    sample: Batch | None = None,
  ):
    self._every, self._sinks, self._clock = every, sinks, clock
    self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
    self._num_steps, self._max_skipped = num_steps, max_skipped
    self._last = (int(state.step), clock.seconds())
    self._pending: tuple[int, Metrics] | None = None
    self._copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params))

    def measures(state, before, sample):
      update = optax.tree.sub(state.params, before)
      return {
        "parameter_norm": optax.tree.norm(state.params),
        "update_norm": optax.tree.norm(update),
        **(statistics(state, before, update, sample) if statistics else {}),
      }

    self._measures, self._sample = jax.jit(measures), sample
    self._before = self._copy_before(int(state.step) + 1, state)

  def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
    self.flush()
    measures = self._measures(state, self._before, self._sample) if self._before is not None else {}
    self._before = self._copy_before(step + 1, state)
    self._pending = (step, {**metrics, **measures})
    if step == self._num_steps:
      self.flush()

  def flush(self) -> None:
    """Writes the row that is held back, if any. Errors: Stop("diverged")."""
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    in_a_row = int(metrics["skipped_in_a_row"])  # waits for that step, while the next one runs
    if self._has_row(step) or in_a_row >= self._max_skipped:
      self._write(step, {name: float(value) for name, value in jax.device_get(metrics).items()})
    if in_a_row >= self._max_skipped:
      raise Stop(
        "diverged",
        step,
        f"{in_a_row} updates in a row had a loss, a gradient or a step that was not finite"
        f"{' or leapt (spikes.sigmas)' if 'spikes' in metrics else ''}; "
        "lower optimizer.learning_rate, or raise max_skipped_updates",
      )

  def _has_row(self, step: int) -> bool:
    return due(step, self._every, self._num_steps)

  def _copy_before(self, step: int, state: TrainState) -> Params | None:
    """The parameters before `step`, copied since it donates them; None if it gets no row."""
    return self._copy(state.params) if self._has_row(step) else None

  def _write(self, step: int, values: dict[str, float]) -> None:
    then, seconds_then = self._last
    seconds = self._clock.seconds()
    self._last = (step, seconds)
    a_step = (seconds - seconds_then) / max(step - then, 1)
    flops = self._flops / a_step
    row = {
      "step": step,
      **values,
      "tokens": step * self._tokens,
      "tokens_per_second": self._tokens / a_step,
      "flops_per_second": flops,
      "peak_share": flops / self._peak,
      "seconds_per_step": a_step,
      "seconds": seconds,
      "seconds_left": a_step * (self._num_steps - step),
      "memory_bytes": hardware.memory_bytes(),
    }
    for sink in self._sinks:
      sink.write(row)


class Evaluate:
  """Rows of `<name>/...` every `every` steps and after the last, computed from the parameters
  alone, or from whatever `of` takes from the state."""

  def __init__(
    self,
    every: int,
    evaluate: Callable[[Params], Mapping[str, Any]],
    sinks: Sequence[Writer],
    clock: Clock,
    *,
    num_steps: int,
    before: Callable[[], None],
    name: str = "eval",
    of: Callable[[TrainState], Params] = operator.attrgetter("params"),
  ):
    self._every, self._evaluate, self._sinks, self._clock = every, evaluate, sinks, clock
    self._num_steps, self._before, self._name, self._of = num_steps, before, name, of

  def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
    if not due(step, self._every, self._num_steps):
      return
    with self._clock.paused(metrics):
      self._before()  # the log's held-back row comes before this one
      start = time.perf_counter()
      result = self._evaluate(self._of(state))
      row = {
        "step": step,
        **{f"{self._name}/{key}": value for key, value in result.items()},
        f"{self._name}/seconds": time.perf_counter() - start,
      }
      for sink in self._sinks:
        sink.write(row)


class Save:
  """Checkpoints every `every` steps and after the last; one at once when asked to stop; and
  temporary ones, at steps with a row in the log, once `every_minutes` have passed since any other.

  rows_every: steps between rows of the log."""

  def __init__(
    self,
    options: config.Checkpoint,
    checkpoints: Checkpoints,
    data_state: Callable[[], Json],
    clock: Clock,
    *,
    tokens_per_step: int,
    num_steps: int,
    before: Callable[[], None],
    record: Callable[[], Json] | None = None,
    rows_every: int = 1,
  ):
    self._options, self._checkpoints, self._data_state = options, checkpoints, data_state
    self._record, self._rows_every, self._saved = record, rows_every, time.monotonic()
    self._clock, self._before = clock, before
    self._tokens, self._num_steps = tokens_per_step, num_steps
    self._asked = False
    # A single process handles the signal itself; several agree on a step through Orbax and
    # jax.distributed, which listens for SIGTERM.
    self._alone = jax.process_count() == 1
    self._previous = {
      number: signal.signal(number, self._ask)
      for number in cli.STOP_SIGNALS
      if (self._alone or number != signal.SIGTERM) and not _is_ignored_hang_up(number)
    }

  def _ask(self, signum: int, frame: Any) -> None:
    if self._alone:
      self._asked = True
    else:
      signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends the run at once

  def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
    self._checkpoints.check()
    preempted = self._asked if self._alone else self._checkpoints.reached_preemption(step)
    lasting = preempted or due(step, self._options.every, self._num_steps)
    if lasting or self._is_time(step):
      with self._clock.paused(metrics):
        self._before()  # a run resumed from here must have this step's row
        try:
          self._checkpoints.save(
            step,
            state,
            self._data_state(),
            {"seconds": self._clock.seconds(), "tokens": float(step * self._tokens)},
            self._record() if self._record else None,
            temporary=not lasting,
          )
        except NotFiniteError as error:
          reason = f"{error}; --from_step goes back to an earlier checkpoint"
          raise Stop("diverged", step, reason) from error
        if preempted:
          self._checkpoints.wait()
      self._saved = time.monotonic()
    if preempted and step != self._num_steps:
      raise Stop("preempted", step, "asked to stop (by a signal); the same command resumes")

  def _is_time(self, step: int) -> bool:
    """Whether a temporary checkpoint is due, by process 0's clock, so that all processes save the
    same step."""
    minutes = self._options.every_minutes
    if not minutes or step % self._rows_every:
      return False
    late = time.monotonic() - self._saved >= 60 * minutes
    return bool(mesh.from_first("late" if late else ""))

  def close(self) -> None:
    """Restores the previous signal handlers."""
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def _is_ignored_hang_up(number: int) -> bool:
  """Whether the signal is SIGHUP and ignored, as under nohup."""
  return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class Profile:
  """Profiler trace of a few steps, for TensorBoard or Perfetto."""

  def __init__(self, directory: PathLike, first: int, steps: int):
    self._directory, self._first, self._last = str(directory), first, first + steps - 1
    self._running = False  # stays so in a run that resumes within these steps: no trace then

  def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
    if step == self._first - 1:
      jax.block_until_ready(metrics)
      jax.profiler.start_trace(self._directory)
      self._running = True
    elif step == self._last:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Ends the trace if one is being taken."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False


class Watchdog:
  """Reports a hang: when no step has ended for `seconds`, writes the stacks of all threads to
  stacks-<process>.txt in the workdir, and says so in the status."""

  def __init__(self, seconds: float, workdir: Workdir, first: int):
    self._seconds, self._workdir, self._first = seconds, workdir, first
    self._last = (first, time.monotonic())  # step, and when it ended
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._thread.start()

  def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
    self._last = (step, time.monotonic())

  def close(self) -> None:
    self._closed.set()
    self._thread.join()

  def _watch(self) -> None:
    told = None
    while not self._closed.wait(self._seconds / 8):
      step, when = last = self._last
      if last != told and time.monotonic() - when > self._seconds:
        told = last
        path = self._workdir.path / f"stacks-{jax.process_index()}.txt"
        with path.open("a") as file:
          file.write(f"no step after {step} for {self._seconds:g} s\n")
          file.flush()
          faulthandler.dump_traceback(file, all_threads=True)
        reason = f"no step for {self._seconds:g} s; where it stands: {path.name}"
        self._workdir.beat(step, self._first, reason)
