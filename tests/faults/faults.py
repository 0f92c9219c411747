"""Faults: what is done to a run, as rows of a table.

Each gets a `Trial`, whose draws are of its seed, and leaves the workdir as the fault left it."""

from __future__ import annotations

import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tests.faults import processes
from tests.faults.processes import EVERY, STEP_SECONDS, STEPS, Illness

if TYPE_CHECKING:
  from tests.faults.trial import Trial

Inflict = Callable[["Trial"], None]


class Fault(NamedTuple):
  """damages: whether sound files are damaged at rest, which counts as told if the next start says
  so; otherwise something happens to processes, which counts as told if their exit codes show it."""

  inflict: Inflict
  damages: bool = False
  processes: tuple[int, ...] = (1, 2)


def at_a_random_moment(trial: Trial, started: list[processes.Process]) -> None:
  """Waits for it: while they start, or behind a step."""
  step = trial.draw.randrange(STEPS)
  trial.note(f"behind step {step}")
  if step:
    processes.until(lambda: processes.last_row(trial.workdir) >= step, started)
  trial.sleep(2 * STEP_SECONDS if step else trial.draw.uniform(0, 5))


def inside_a_save(trial: Trial, started: list[processes.Process]) -> None:
  """Waits until a checkpoint that is drawn is being written, and some."""
  step = trial.draw.randrange(EVERY, STEPS, EVERY)
  folder = trial.workdir / "checkpoints"
  trial.note(f"in the save of step {step}")

  def is_being_saved() -> bool:
    return folder.exists() and any(
      path.name.startswith(str(step)) for path in folder.iterdir() if "damaged" not in path.name
    )

  processes.until(is_being_saved, started)
  trial.sleep(0.3)


def signalled(number: int, when=at_a_random_moment, victims=(0, 1), times: int = 1) -> Inflict:
  def inflict(trial: Trial) -> None:
    for _ in range(times):
      started = trial.start()
      when(trial, started)
      victim = trial.draw.choice([i for i in victims if i < len(started)])
      trial.note(f"process {victim}")
      started[victim].send(number)
      trial.end(started, victim, number)

  return inflict


def full_disk(trial: Trial) -> None:
  victim = trial.draw.randrange(trial.kind.processes)
  limit = trial.draw.randrange(8_000, 150_000)
  trial.note(f"{limit} bytes on process {victim}")
  trial.end(trial.start(illnesses={victim: Illness(file_bytes=limit)}))


def few_descriptors(trial: Trial) -> None:
  """Of a run that is resumed, so that there is something to lose."""
  trial.begin_stopped()
  victim = trial.draw.randrange(trial.kind.processes)
  limit = trial.draw.randrange(12, 64)
  trial.note(f"{limit} on process {victim}")
  trial.end(trial.start(illnesses={victim: Illness(descriptors=limit)}))
  assert not list((trial.workdir / "checkpoints").glob("damaged-*")), "sound ones were set aside"


def nan_in_a_moment(trial: Trial) -> None:
  """If the run is reported to have diverged, it goes back to before that."""
  step, leaf = trial.draw.randrange(EVERY + 2, STEPS), trial.draw.random()
  trial.note(f"in front of step {step}, array {leaf:.3f}")
  illness = Illness(nan_step=step, leaf=leaf)
  trial.end(trial.start(illnesses=dict.fromkeys(range(trial.kind.processes), illness)))
  if processes.status(trial.workdir)["status"] == "diverged":
    sound = max(found for found in processes.steps(trial.workdir) if found < step)
    trial.flags = [f"--from_step={sound}"]


def random_file(folder: pathlib.Path, trial: Trial, *left_out: str) -> pathlib.Path:
  files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
  chosen = trial.draw.choice([path for path in files if path.parts[0] not in left_out])
  trial.note(str(chosen))
  return folder / chosen


def flip(path: pathlib.Path, trial: Trial) -> None:
  content = bytearray(path.read_bytes())
  if content:
    at = trial.draw.randrange(8 * len(content))
    trial.note(f"bit {at}")
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def cut(path: pathlib.Path, trial: Trial) -> None:
  content = path.read_bytes()
  left = trial.draw.randrange(len(content)) if content else 0
  trial.note(f"{left} of {len(content)} bytes left")
  path.write_bytes(content[:left])


def delete(path: pathlib.Path, trial: Trial) -> None:
  path.unlink()


def of_the_newest_checkpoint(damage) -> Inflict:
  def inflict(trial: Trial) -> None:
    trial.begin_stopped()
    newest = trial.workdir / "checkpoints" / str(processes.steps(trial.workdir)[-1])
    damage(random_file(newest, trial), trial)

  return inflict


def of_all_checkpoints(trial: Trial) -> None:
  """Each in its largest file, or one that is drawn."""
  trial.begin_stopped()
  for step in processes.steps(trial.workdir):
    folder = trial.workdir / "checkpoints" / str(step)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    chosen = largest if trial.draw.random() < 0.5 else trial.draw.choice(files)
    trial.note(str(chosen.relative_to(trial.workdir)))
    trial.draw.choice([flip, cut, delete])(chosen, trial)


def newest_of_another_run(trial: Trial) -> None:
  """With its own sums, which hold: of the same model, from another seed."""
  trial.begin_stopped()
  ours = trial.workdir / "checkpoints" / str(processes.steps(trial.workdir)[-1])
  theirs = trial.suite.other(trial.kind) / "checkpoints"
  found = theirs / str(processes.steps(theirs.parent)[-1])
  if trial.draw.random() < 0.5:
    shutil.rmtree(ours)
    shutil.copytree(found, ours)
    return
  path = random_file(found, trial)
  target = ours / path.relative_to(found)
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(path, target)


def of_the_workdir(trial: Trial) -> None:
  trial.begin_stopped()
  path = random_file(trial.workdir, trial, "checkpoints", "lock")
  trial.draw.choice([flip, cut, delete])(path, trial)


def of_the_dataset(trial: Trial) -> None:
  trial.begin_stopped()
  shutil.copytree(trial.datasets, trial.folder / "data")
  trial.datasets = trial.folder / "data"
  flip(random_file(trial.datasets, trial), trial)


FAULTS = {
  "kill -9 at a random moment": Fault(signalled(signal.SIGKILL), processes=(1,)),
  "kill -9 at three random moments": Fault(signalled(signal.SIGKILL, times=3), processes=(1,)),
  "kill -9 inside a save": Fault(signalled(signal.SIGKILL, inside_a_save)),
  "kill -9 of process 0 of two": Fault(signalled(signal.SIGKILL, victims=(0,)), processes=(2,)),
  "kill -9 of process 1 of two": Fault(signalled(signal.SIGKILL, victims=(1,)), processes=(2,)),
  "SIGSTOP of one of two": Fault(signalled(signal.SIGSTOP), processes=(2,)),
  "SIGTERM": Fault(signalled(signal.SIGTERM)),
  "SIGINT": Fault(signalled(signal.SIGINT)),
  "SIGHUP": Fault(signalled(signal.SIGHUP)),
  "SIGUSR1": Fault(signalled(signal.SIGUSR1)),
  "full disk": Fault(full_disk),
  "few descriptors": Fault(few_descriptors),
  "NaN in a moment": Fault(nan_in_a_moment),
  "bit flipped in the newest checkpoint": Fault(of_the_newest_checkpoint(flip), damages=True),
  "file cut in the newest checkpoint": Fault(of_the_newest_checkpoint(cut), damages=True),
  "file deleted in the newest checkpoint": Fault(of_the_newest_checkpoint(delete), damages=True),
  "another run's file, or all, in its place": Fault(newest_of_another_run, damages=True),
  "damage of every checkpoint": Fault(of_all_checkpoints, damages=True),
  "damage of the workdir's other files": Fault(of_the_workdir, damages=True),
  "bit flipped in the prepared data": Fault(of_the_dataset, damages=True),
}
