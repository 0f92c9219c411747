"""One round: a run that a fault befalls, and the same command again until it has ended."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator

from tests.faults import processes
from tests.faults.faults import FAULTS
from tests.faults.processes import EVERY, KINDS, STEPS, Kind, Process

STARTS = 3  # of the same command, at most, until a run has ended
DONE, FAILED, REFUSED = 0, 1, 2


@dataclasses.dataclass
class Result:
  """How a round went. problem: what should not be, or nothing."""

  fault: str
  round: int
  seed: int
  kind: str
  hit: str = ""  # where it was hit
  codes: list[list[int]] = dataclasses.field(default_factory=list)  # of each start
  outcome: str = ""  # told | harmless
  lost: int = 0  # steps that were made again
  seconds: float = 0.0  # from a start to a step that had not been made
  same: bool = False  # whether the end is that of an undisturbed run
  problem: str = ""


class Suite:
  """What the rounds share, in a folder that outlives them: corpus, datasets, and for each kind an
  undisturbed run, one that was asked to stop, and one of another seed."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder.absolute()
    self.corpus, self.datasets = self.folder / "corpus", self.folder / "datasets"
    processes.write_corpus(self.corpus)

  def start(
    self, kind: Kind, workdir: pathlib.Path, logs: pathlib.Path, *flags, **how
  ) -> list[Process]:
    how = {"datasets": self.datasets, **how}
    return processes.start(kind, workdir, logs, *flags, corpus=self.corpus, **how)

  def alone(self, kind: Kind) -> pathlib.Path:
    """A run that nothing befell."""
    with self._made(kind, "alone") as (workdir, logs, is_new):
      if is_new:
        self._finish(self.start(kind, workdir, logs), DONE)
    return workdir

  def stopped(self, kind: Kind, name: str = "stopped", **changed) -> pathlib.Path:
    """A run that was asked to stop, with several checkpoints."""
    with self._made(kind, name) as (workdir, logs, is_new):
      if is_new:
        started = self.start(kind, workdir, logs, **changed)
        processes.until(lambda: processes.last_row(workdir) >= 2 * EVERY + 2, started)
        started[0].send(signal.SIGTERM)
        self._finish(started, 42)
    return workdir

  def other(self, kind: Kind) -> pathlib.Path:
    return self.stopped(kind, "other", seed=1)

  @contextlib.contextmanager
  def _made(self, kind: Kind, name: str) -> Iterator[tuple[pathlib.Path, pathlib.Path, bool]]:
    """(workdir, logs, whether it has yet to be made); an unfinished one is made again."""
    folder = self.folder / kind.name.replace(", ", "-").replace(" ", "-")
    folder.mkdir(exist_ok=True)
    done, workdir, logs = folder / f"{name}.done", folder / name, folder / f"{name}-logs"
    with open(folder / "lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      is_new = not done.exists()
      if is_new:
        for old in (workdir, logs):
          shutil.rmtree(old, ignore_errors=True)
      yield workdir, logs, is_new
      done.touch()

  def _finish(self, started: list[Process], code: int) -> None:
    codes = [process.wait() for process in started]
    assert set(codes) == {code}, f"{codes}: {started[0].said()[-2000:]}"


class Trial:
  """What a fault sees of its round."""

  def __init__(self, suite: Suite, fault: str, number: int, seed: int):
    row = FAULTS[fault]
    self.draw = random.Random(f"{seed}/{fault}/{number}")
    kinds = [kind for kind in KINDS if kind.processes in row.processes]
    self.suite, self.kind = suite, kinds[number % len(kinds)]
    self.datasets = suite.datasets
    self.flags: list[str] = []  # of the first start that recovers
    name = re.sub(r"\W+", "-", fault)
    self.folder = suite.folder / "rounds" / f"{name}-{number}-{seed}"
    shutil.rmtree(self.folder, ignore_errors=True)
    self.workdir, self.logs = self.folder / "run", self.folder / "logs"
    self.logs.mkdir(parents=True)
    self.result = Result(fault, number, seed, self.kind.name)
    self._fault = row
    self._rows_behind = 0  # a step up to which rows were gone, as was told
    self._started: list[Process] = []

  def note(self, text: str) -> None:
    self.result.hit += ("; " if self.result.hit else "") + text

  def sleep(self, seconds: float) -> None:
    """Any time up to so many seconds."""
    time.sleep(self.draw.uniform(0, seconds))

  def begin_stopped(self) -> None:
    """The workdir is a copy of the run that was asked to stop."""
    shutil.copytree(self.suite.stopped(self.kind), self.workdir)

  def start(self, *flags: str, **how) -> list[Process]:
    how = {"datasets": self.datasets, **how}
    self._started = self.suite.start(self.kind, self.workdir, self.logs, *flags, **how)
    return self._started

  def end(self, started: list[Process], victim: int | None = None, number: int = 0) -> None:
    """Waits for all of them, last for one that was stopped. Exit codes go into the result.

    Errors: AssertionError where others than the victim of a signal do not tell."""
    mortal = number in (signal.SIGKILL, signal.SIGSTOP)
    began = time.monotonic()
    codes = [None if i == victim and mortal else p.wait() for i, p in enumerate(started)]
    took = time.monotonic() - began
    self.result.codes.append(codes)
    if victim is not None and mortal:
      started[victim].send(signal.SIGKILL)
      codes[victim] = started[victim].wait()
      others = [code for i, code in enumerate(codes) if i != victim]
      assert set(others) <= {DONE, FAILED}, f"exit codes {codes}"
      if FAILED in others:
        self.note(f"the other ended after {took:.0f} s")
        now = processes.status(self.workdir)
        assert now["status"] != "failed" or f"process {victim} of 2" in now["reason"], now

  def run(self) -> Result:
    alone, result = self.suite.alone(self.kind), self.result
    try:
      self._fault.inflict(self)
      told = any(code != DONE for codes in result.codes for code in codes)
      before = processes.last_row(self.workdir)
      committed = processes.steps(self.workdir)
      told |= self._recover(before, committed)
      end, expected = (processes.outcome(run, self._rows_behind) for run in (self.workdir, alone))
      result.same = end == expected
      result.outcome = "told" if told else "harmless"
      if not result.same:
        differ = [name for name, value in expected.items() if end[name] != value]
        result.problem = f"another end: {', '.join(differ)}" + ("" if told else ", SILENT")
      elif processes.status(self.workdir)["status"] != "done":
        result.problem = f"status {processes.status(self.workdir)}"
    except AssertionError as error:
      result.problem = " ".join(str(error).split())[-1500:]
    finally:
      for process in self._started:
        process.send(signal.SIGKILL)
    if not result.problem:
      shutil.rmtree(self.folder)
    return result

  def _recover(self, before: int, committed: list[int]) -> bool:
    """The same command until it is done; whether it told of damage. What is refused is restored
    from a copy, as the refusal asks."""
    told = False
    for left in range(STARTS, 0, -1):
      kept = _content(self.workdir)
      began = time.monotonic()
      started = self.start(*self.flags)
      self.flags = []
      first = started[0]
      processes.until(lambda said=first.said: re.search(r"step +\d+/", said()), started)
      self.result.seconds = time.monotonic() - began
      codes = [process.wait() for process in started]
      self.result.codes.append(codes)
      said = first.said()
      if set(codes) == {DONE}:
        resumed = re.search(r"resuming from step (\d+)", said)
        at = int(resumed[1]) if resumed else STEPS if "nothing left to do" in said else 0
        self.result.lost = max(before - at, 0)
        told |= any(word in said for word in ("damaged", "not verified", "going back", "is gone"))
        newest = max(committed, default=0)
        assert at >= newest or told, f"resumed from {at} and not from {newest}, without a word"
        sound = [step for step in committed if f"checkpoints/{step} is damaged" not in said]
        assert at >= max([0, *sound]) or "going back" in said, f"resumed from {at} of {committed}"
        if gone := re.search(r"metrics\.jsonl is gone; its rows will begin after step (\d+)", said):
          self._rows_behind = int(gone[1])
        allowed = EVERY * (2 if at < before - before % EVERY else 1)
        assert self.result.lost <= allowed, f"{self.result.lost} steps lost"
        return told
      assert left > 1, f"{codes}: {said[-1500:]}"
      if REFUSED in codes:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert lines and str(self.folder) in lines[-1], f"names no file: {said[-1500:]}"
        assert self._fault.damages, f"refused: {lines[-1]}"
        assert _content(self.workdir) == kept, "a refusal changed the workdir"
        self.note(lines[-1].replace(str(self.folder), ""))
        self._restore()
        told = True
    raise AssertionError("unreachable")

  def _restore(self) -> None:
    shutil.rmtree(self.workdir)
    self.begin_stopped()
    self.datasets = self.suite.datasets


def _content(workdir: pathlib.Path) -> dict[str, bytes]:
  """What a refusal must leave as it was."""
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(workdir.rglob("*"))
    if path.is_file() and path.name != "lock"
  }
