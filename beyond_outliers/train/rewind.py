"""Going back to an older checkpoint: what the run wrote after it is moved to a folder aside."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import jax
from etils import epath

from beyond_outliers import mesh
from beyond_outliers.config.checks import require
from beyond_outliers.errors import remedy_for
from beyond_outliers.workdir import Workdir, mismatch


def check_step(workdir: Workdir, step: int) -> None:
  """Refuses a step that a run cannot go back to, as far as its checkpoint's files show. Only after
  it has really been restored may `rewind` move what came later.

  Errors: ConfigError if there is no such checkpoint, or if it is damaged."""
  known = _known(workdir) if workdir.read("config.json") is not None else []
  require(step in known, "--from_step", step, f"{workdir.path} has the checkpoints {known}")
  # Only the first process looks, for all.
  problem = _problem(workdir.checkpoints / str(step)) if jax.process_index() == 0 else ""
  problem = mesh.from_first(problem)
  require(not problem, "--from_step", step, problem)


def rewind(workdir: Workdir, step: int, say: Callable[[str], None]) -> None:
  """Makes `step`, which has been restored, the newest checkpoint of a workdir, whose lock is held.

  Later checkpoints, evaluation results for them, later rows of metrics.jsonl and the status are
  moved to aside-STEP-TIME/ in the workdir."""
  # As found by the first process, which also moves them.
  later = mesh.from_first([found for found in _known(workdir) if found > step])
  aside = workdir.path / f"aside-{step}-{time.time_ns()}"
  if jax.process_index() == 0:
    _set_aside(workdir, step, later, aside)
  say(
    f"going back to step {step}: checkpoints {later} and everything later are now in "
    f"{workdir.path / mesh.from_first(aside.name)}"
  )


def _known(workdir: Workdir) -> list[int]:
  names = [found.name for found in workdir.checkpoints.glob("*")]  # includes temporary ones
  return sorted(int(name) for name in names if name.isdigit())


def _problem(checkpoint: epath.Path) -> str:
  """Why a run cannot go back to this checkpoint, or ""."""
  try:
    damage = mismatch(checkpoint)
  except OSError as error:
    return f"that checkpoint: {error}; {remedy_for(error, 'use another')}"
  return f"that checkpoint is damaged: {damage}; use another" if damage else ""


def _set_aside(workdir: Workdir, step: int, later: list[int], aside: epath.Path) -> None:
  (aside / "checkpoints").mkdir(parents=True)
  (aside / "eval").mkdir()
  # Rows before checkpoints: a start that finds the checkpoints gone would drop the rows.
  rows = [line for line, row in workdir.read_rows() if row["step"] > step]
  (aside / "metrics.jsonl").write_text("".join(line + "\n" for line in rows))
  status = workdir.path / "status.json"
  if status.exists():  # until the run has compiled, it would still say that the run has ended
    status.rename(aside / status.name)
  for result in sorted((workdir.path / "eval").glob("*.json")):
    number = re.match(r"(\d+)-", result.name)
    if number and int(number[1]) > step:
      result.rename(aside / "eval" / result.name)
  for found in later[::-1]:  # newest first: if interrupted, the run resumes from what is left
    (workdir.checkpoints / str(found)).rename(aside / "checkpoints" / str(found))
