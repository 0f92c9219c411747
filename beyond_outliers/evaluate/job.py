"""An evaluation job: runs an evaluator on a target's checkpoints, once or as they are written."""

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from typing import Any

from beyond_outliers import mesh as mesh_lib
from beyond_outliers import stores
from beyond_outliers.config.files import is_locked
from beyond_outliers.errors import CheckpointError, ConfigError
from beyond_outliers.evaluate.evaluator import Evaluator
from beyond_outliers.evaluate.plan import Cell
from beyond_outliers.evaluate.results import Result, WriteError
from beyond_outliers.evaluate.table import shown
from beyond_outliers.evaluate.target import GoneError, Target
from beyond_outliers.mesh import processes
from beyond_outliers.types import Params, PathLike
from beyond_outliers.workdir import Workdir

SILENCE = 1800.0  # seconds without a sign of life from the run, after which the job says so
RECORDS = ("config.json", "manifest.json", "status.json")  # in the order in which a run writes them


class Progress:
  """Progress of a job on stderr: redrawn on a terminal; elsewhere one line per cell, and one every
  `every` seconds within a long cell."""

  def __init__(self, every: float = 30.0):
    self._redraw, self._every = sys.stderr.isatty(), every
    self._silent = not processes.is_first()
    self._what, self._last = "", time.monotonic()
    self._spent, self._measured = 0.0, 0

  def begin(self, what: str) -> None:
    self._what, self._last = what, time.monotonic()

  def __call__(self, text: str) -> None:
    if self._redraw and not self._silent:
      print(f"\r\x1b[K{self._what} · {text}", end="", file=sys.stderr, flush=True)
    elif time.monotonic() - self._last > self._every:
      self.line(f"{self._what} · {text}")

  def done(self, text: str, seconds: float, cells_left: int) -> None:
    self._spent, self._measured = self._spent + seconds, self._measured + 1
    left = datetime.timedelta(seconds=round(self._spent / self._measured * cells_left))
    self.line(f"{self._what} · {text} · {seconds:.1f} s · {cells_left} to go, {left} left")

  def line(self, text: str) -> None:
    if not self._silent:
      print(("\r\x1b[K" if self._redraw else "") + text, file=sys.stderr, flush=True)
    self._last = time.monotonic()


def wait_for_run(workdir: PathLike, progress: Progress, poll: float) -> None:
  """Waits until a run has written its RECORDS. poll: seconds. Errors: WorkdirError."""
  copy = stores.Copy(os.fspath(workdir)) if stores.is_address(workdir) else None
  folder = Workdir(copy.folder if copy else workdir).path

  def has_begun() -> bool:
    if copy:
      copy.refresh()
    return all((folder / name).exists() for name in RECORDS)

  if not has_begun():
    progress.line(f"waiting for a run in {copy.address if copy else folder}")
  while not has_begun():
    time.sleep(poll)


class Watch:
  """Reports changes in a followed run to a person. dead: the run was killed: it has been silent for
  longer than its watchdog allows, and no process holds its lock."""

  def __init__(self, target: Target, progress: Progress):
    self._target, self._progress = target, progress
    self._status, self._since = "", time.monotonic()
    self._wrote: Any = None
    self._told = self.dead = False

  def look(self) -> None:
    status, wrote = self._target.status(), self._target.last_write()
    # Process 0's clock, and below its view of the lock, so that all processes decide alike.
    silent = mesh_lib.found_by_first(lambda: time.monotonic() - self._since)
    if status != self._status:
      self._progress.line(f"run: {status}")
    if (status, wrote) != (self._status, self._wrote):
      self._status, self._wrote, self._since = status, wrote, time.monotonic()
      self._told = self.dead = False
    elif silent > SILENCE and not self._told:
      self._progress.line(
        f"run: {status}, but silent for {SILENCE / 60:.0f} minutes; if it was killed, resume it or "
        "end this job"
      )
      self._told = True
    elif not self.dead and status.startswith("running") and self._is_abandoned(silent):
      self.dead = True
      self._progress.line(f"run: dead, as no process holds its lock; it was {status}; resume it")

  def _is_abandoned(self, silent: float) -> bool:
    origin = self._target.origin
    # Until then, a run with a watchdog reports a step that hangs itself.
    patience = max(SILENCE, 1.5 * origin["config"]["log"]["watchdog_seconds"])
    if silent <= patience:
      return False
    workdir = origin["workdir"]
    return mesh_lib.found_by_first(
      lambda: not stores.is_address(workdir) and not is_locked(os.path.join(workdir, "lock"))
    )


class Job:
  """Runs an `Evaluator` on one checkpoint of a target after another; unreadable ones are reported
  and skipped.

  Errors: DataError for damaged data; WriteError; WorkdirError where another training has replaced
  the target."""

  def __init__(self, target: Target, evaluator: Evaluator, progress: Progress, poll: float = 10.0):
    self._target, self._evaluator, self._progress, self._poll = target, evaluator, progress, poll
    self.skipped: dict[int, list[str]] = {}  # step -> why it, or some of its cells, were skipped
    # Whether a cell of a readable checkpoint could not be measured, a result is missing, or the run
    # is dead.
    self.failed = False
    self.evaluated: set[int] = set()  # steps that could be read, or were complete already
    self._told: set[tuple[int, Cell]] = set()  # cells reported as impossible to measure

  def once(self, steps: list[int]) -> None:
    for i, step in enumerate(steps):
      self._evaluate(step, later=steps[i + 1 :])

  def newest(self) -> list[int]:
    """Evaluates the newest readable checkpoint; returns its step, in a list. `failed` is set unless
    it is the newest of all, which was asked for."""
    steps = self._target.steps()
    for step in steps[::-1]:
      if self._evaluate(step):
        self.failed |= step != steps[-1]
        return [step]
    return []

  def follow(self, wanted: Collection[int] | None = None) -> None:
    """Evaluates until all wanted checkpoints are done, or the run has ended and all of its are;
    `failed` is set if the run is dead.

    A checkpoint that was saved again is evaluated again."""
    target = self._target
    seen: dict[int, Any] = {}  # step -> its files when it was read
    left = {step for step in wanted or () if self._evaluator.missing(step)}
    watch = Watch(target, self._progress)
    while wanted is None or left:
      target.check()
      watch.look()
      ended = (
        target.ended() or watch.dead
      )  # before listing steps, so that a run seen as ended has all of its steps in the list
      steps = [step for step in target.steps() if wanted is None or step in wanted]
      seen = {step: written for step, written in seen.items() if step in steps}
      waiting = [step for step in steps if step not in seen or target.written(step) != seen[step]]
      if waiting:
        # One per turn, since others may be deleted meanwhile.
        seen[waiting[0]] = target.written(waiting[0])
        if self._evaluate(waiting[0], later=waiting[1:]):
          left.discard(waiting[0])
      elif ended:
        self.failed |= watch.dead
        return
      else:
        time.sleep(self._poll)

  def check_results(self, asked: Collection[int]) -> None:
    """Reports missing cells of the steps that were asked for or evaluated, and sets `failed` if
    there are any."""
    for step in sorted({*asked, *self.evaluated}):
      missing = self._evaluator.missing(step)
      self.failed |= bool(missing)
      if missing and step not in {*self.evaluated, *self.skipped}:
        self._skip(step, "there was no such checkpoint")
      for cell in missing if step in self.evaluated else ():
        if (step, cell) not in self._told:
          self._skip(
            step, f"{cell.recipe}, {cell.method}: its result has been removed since it was written"
          )

  def _evaluate(self, step: int, later: Sequence[int] = ()) -> bool:
    """Evaluates one checkpoint; False if it could not be read, or was gone before its results."""
    missing = self._evaluator.missing(step)
    self.skipped.pop(step, None)
    if not missing:
      self.evaluated.add(step)
      return True
    self._evaluator.make_folder()
    self._progress.begin(f"step {step}")
    try:
      params = self._target.params(step)
    except (CheckpointError, OSError) as error:
      processes.raise_alone(error)
      time.sleep(1.0)  # a deletion in progress looks like damage
      self._target.check()
      gone = step not in self._target.steps()
      self._skip(step, "deleted before it could be read (checkpoint.keep)" if gone else str(error))
      return False
    self.evaluated.add(step)
    to_go = len(missing) + sum(len(self._evaluator.missing(other)) for other in later)
    for i, cell in enumerate(missing, 1):
      try:
        self._measure(step, params, cell, to_go - i)
      except GoneError as error:  # gone for all cells; the run may save the step again
        self.evaluated.discard(step)
        self._skip(step, f"{error}: the result is dropped")
        return False
    return True

  def _measure(self, step: int, params: Params, cell: Cell, to_go: int) -> None:
    self._progress.begin(f"step {step} · {cell.recipe} · {cell.method}")
    start = time.perf_counter()
    try:
      result = self._evaluator.measure(step, params, cell)
    except (WriteError, GoneError):
      raise
    # Out of memory, a checkpoint unfit for the method, a task: other cells may still work.
    except Exception as error:
      self._target.text.dataset.sums.check()  # damaged data concern every cell
      processes.raise_alone(error)
      if not isinstance(error, ConfigError):
        traceback.print_exc()
      self.failed = True
      self._told.add((step, cell))
      reason = " ".join(str(error).split())
      self._skip(step, f"{cell.recipe}, {cell.method}: {type(error).__name__}: {reason}")
    else:
      self._progress.done(_in_short(result), time.perf_counter() - start, to_go)

  def _skip(self, step: int, reason: str) -> None:
    self.skipped.setdefault(step, []).append(reason)
    self._progress.line(f"step {step} · skipped: {reason}")


def _in_short(result: Result) -> str:
  metrics = result["metrics"]
  text = f"loss {shown(metrics['loss'])}"
  if "kl" in metrics:
    difference = shown(metrics["loss_difference"], "+.4f")
    text += f" ({difference}) · KL {shown(metrics['kl'])}"
  return text
