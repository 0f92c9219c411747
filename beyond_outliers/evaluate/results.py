"""Results of evaluation jobs: one JSON file per measurement, named by a hash of its settings.

Settings are everything that the values depend on. So no result is replaced by one measured under
other settings, and any number of runs and jobs may share a folder. The scores of a task of the
lm-evaluation-harness are a file of their own, next to the cell of the model that was asked.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from etils import epath

from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.config.files import is_elsewhere, make_folder, misfit, read_json
from beyond_outliers.config.sums import digest
from beyond_outliers.errors import Failure, WorkdirError
from beyond_outliers.mesh import jax_settings
from beyond_outliers.types import Json, PathLike

if TYPE_CHECKING:
  from beyond_outliers import runs as runs_lib

# IDENTITY, and the fields of a cell (CELL), or of a task's answers (ASKED).
Result = dict[str, Any]
IDENTITY = {"step": int, "recipe": str, "method": str, "settings": dict, "settings.version": int}
NUMBER = int | float | None  # None: not finite
CELL = {"metrics": dict, "metrics.loss": NUMBER, "size_bytes": int}
ASKED = {"scores": dict, "seconds": float | int, "time": str}
COUNTS = {"split": str, "scored": int, "left_out": int, "truncated": int}
TASK = "task"  # a setting that only results of tasks have
PARAMETERS = "parameters"  # digest of the measured parameters, where their checkpoint has one


def file_name(step: int, recipe: str, method: str, settings: Json) -> str:
  words = [str(step), recipe, method, *([settings[TASK]] if TASK in settings else [])]
  name = "-".join(re.sub(r"[^\w.+=()]", "_", word) for word in words)
  return f"{name}-{digest(settings)[:8]}.json"


def warn(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


_warn_once = functools.cache(warn)


class WriteError(Failure):
  """A result that could not be written; others would fail as well."""


class ResultStore:
  """Results of any models, in one folder.

  say: receives what is wrong with a file, once; the file then counts as missing."""

  def __init__(self, path: PathLike, say: Callable[[str], None] = warn):
    self._workdir, self._say = workdir_lib.Workdir(path), functools.cache(say)
    self._held: int | None = None  # descriptor of the folder, once `make_folder` has opened it

  @property
  def path(self) -> epath.Path:
    return self._workdir.path

  def make_folder(self) -> None:
    """Makes the folder, once. Errors: WorkdirError if it cannot be written; WriteError if it, or
    one above it, was moved or removed since: a new folder would have only part of the results."""
    if self._held is None:
      make_folder(self.path, WorkdirError, "give another folder as --out")
      self._held = os.open(self.path, os.O_RDONLY)
      weakref.finalize(self, os.close, self._held)
    elif is_elsewhere(self._held, self.path):
      raise WriteError(
        f"{self.path} was moved or removed while this job wrote to it, and the job ends; give the "
        "same command once it is back, or for where it is now"
      )

  def read(
    self, step: int, recipe: str, method: str, settings: Json, digest: str = ""
  ) -> Result | None:
    """The result, as process 0 finds it; all processes must call this. digest: of the parameters
    that it must be of, where they have one."""
    return mesh_lib.found_by_first(lambda: self._read(step, recipe, method, settings, digest))

  def _read(
    self, step: int, recipe: str, method: str, settings: Json, digest: str
  ) -> Result | None:
    path = self.path / file_name(step, recipe, method, settings)
    found = self._load(path) if path.exists() else None
    if found is None or found["settings"] != settings:
      return None
    if not is_of(found, digest):
      self._say(f"{path} was measured on other parameters than step {step} has now, and is ignored")
      return None
    return found

  def write(self, step: int, recipe: str, method: str, settings: Json, found: Result) -> None:
    """Writes a result. Errors: as `make_folder`, and WriteError."""
    name = file_name(step, recipe, method, settings)
    self.make_folder()
    try:
      self._workdir.write(name, found)
    except OSError as error:
      raise WriteError(
        f"{self.path / name} could not be written ({error.strerror or error}); what was measured "
        "before is in that folder: free what has run out, and give the same command"
      ) from error

  def cells(self) -> list[Result]:
    """Every cell with its tasks (see `joined`), as process 0 finds them."""
    return mesh_lib.found_by_first(self._cells)

  def _cells(self) -> list[Result]:
    loaded = (self._load(path) for path in sorted(self.path.glob("*.json")))
    found = [result for result in loaded if result is not None]
    tasks = sorted(
      (result for result in found if "scores" in result), key=lambda task: task["time"]
    )
    return [
      joined(cell, [task for task in tasks if _same_model(cell, task)])
      for cell in found
      if "metrics" in cell
    ]

  def _load(self, path: epath.Path) -> Result | None:
    try:
      found: Any = read_json(path, WorkdirError, "it may be removed")
    except FileNotFoundError:  # gone since it was listed
      return None
    except WorkdirError as error:
      self._say(f"{path} is not a result that can be read, and is ignored ({error})")
      return None
    settings = found.get("settings")
    if isinstance(settings, dict):
      found["settings"] = {"version": 1, **settings}  # version 1 did not write its number
    if misfit(found, IDENTITY) or not (_is_cell(found) or _is_answer(found)):
      self._say(f"{path} is not a result of an evaluation job, and is ignored")
      return None
    row = found["recipe"].partition(",")[0]  # without a run's own rules, as Cell.row
    name = file_name(found["step"], row, found["method"], settings)
    if path.name != name and re.search(r"-[0-9a-f]{8}\.json$", path.name):
      self._say(f"{path} holds the result that belongs in {name}, and is ignored")
      return None
    return found


def is_of(found: Result, digest: str) -> bool:
  """Whether a result is of the parameters with this digest; true if either digest is unknown."""
  return digest in ("", found.get(PARAMETERS, digest))


def names_of(run: runs_lib.Run) -> tuple[str, str]:
  """How cells name the training of a run: by its identity, or, in earlier versions, its time."""
  return run.identity, run.manifest["time"]


def of_run(run: runs_lib.Run, cells: Iterable[Result]) -> list[Result]:
  """The cells of a run, and of the parameters that its checkpoints have now. One whose parameters a
  rewound run has replaced is reported, once, and left out."""
  itself, found = names_of(run), []
  digest_of = functools.cache(run.digest)
  for cell in cells:
    if cell["settings"].get("trained") in itself:
      if is_of(cell, digest_of(cell["step"])):
        found.append(cell)
      else:
        which = "step {step}, {recipe}, {method}".format_map(cell)
        _warn_once(
          f"{run.name}: the cell of {which} was measured on other parameters than that step has "
          "now, and is ignored; evaluate it again"
        )
  return found


def joined(cell: Result, tasks: list[Result]) -> Result:
  """The cell with `tasks`: {name: scores}, members of groups and tags included. Of several answers
  to one task the last counts; all are in `answers`, each with the hash of what was asked.

  Also with `examples`: {name: counts of the examples}, where they were counted; and with
  `largest_gain` and `units` of the error's propagation, where that was measured."""
  scores = {name: metrics for task in tasks for name, metrics in task["scores"].items()}
  answers = [(name, "", metrics) for name, metrics in cell.get("tasks", {}).items()]  # version 1
  answers += [
    (name, task["settings"].get("content", ""), metrics)
    for task in tasks
    for name, metrics in task["scores"].items()
  ]
  examples = {name: counts for task in tasks for name, counts in task.get("examples", {}).items()}
  propagation = {
    name: task[name] for task in tasks for name in ("largest_gain", "units") if name in task
  }
  spent = sum(task["seconds"] for task in tasks)
  return {
    **cell,
    "tasks": {**cell.get("tasks", {}), **scores},
    **({"answers": answers} if answers else {}),
    **({"examples": examples} if examples else {}),
    **propagation,
    "seconds": {"tasks": spent, **cell.get("seconds", {})},
  }


def task_scores(cell: Result) -> dict[str, float]:
  """Scores of a cell's tasks, as `task/metric`."""
  return {
    f"{task}/{name}": value
    for task, metrics in cell["tasks"].items()
    for name, value in metrics.items()
  }


def _is_cell(found: Any) -> bool:
  """Whether it has the fields of CELL, and its metrics are numbers, or pairs for intervals."""
  return (
    not misfit({"seconds": {}, **found}, {**CELL, "seconds": dict})
    and all(isinstance(value, int | float) for value in found.get("seconds", {}).values())
    and all(
      isinstance(value, list) and len(value) == 2 and all(isinstance(n, NUMBER) for n in value)
      if name.endswith("_interval")
      else isinstance(value, NUMBER)
      for name, value in found["metrics"].items()
    )
  )


def _is_answer(found: Any) -> bool:
  """Whether it has the fields of ASKED, and COUNTS of its examples, which older ones lack."""
  examples = found.get("examples", {})
  return (
    not misfit(found, ASKED)
    and all(isinstance(scores, dict) for scores in found["scores"].values())
    and isinstance(examples, dict)
    and not any(misfit(counts, COUNTS) for counts in examples.values())
  )


def _same_model(cell: Result, task: Result) -> bool:
  """Whether a cell and a task agree in all settings that both have."""
  ours, theirs = (
    {
      "average": "",  # recorded only where an average was measured
      **jax_settings.DEFAULTS,  # recorded only where they were changed
      **result["settings"],
      **{name: result[name] for name in ("step", "recipe", "method")},
    }
    for result in (cell, task)
  )
  return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
