"""Tasks of an evaluation job, and models' answers to them, through the harness."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from etils import epath

from beyond_outliers import data
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import offline_tasks
from beyond_outliers.evaluate.text import Text
from beyond_outliers.types import Json, LanguageModel, Params

if TYPE_CHECKING:  # needs the extra `eval`
  from beyond_outliers.evaluate.harness import LoadedTask


Scores = dict[str, dict[str, float]]


class Answers(NamedTuple):
  """A model's scores on tasks, and the examples that they are over."""

  scores: Scores  # {task or group: {metric: value, metric_stderr: value}}
  examples: dict[str, Json]  # {task: {split, scored, left_out, truncated}}: numbers of examples
  left_out: list[Json]  # {task, example, reason}: the first few of each task


class TaskSuite:
  """Asks any number of models the same tasks, with texts begun as `text` says.

  say: receives progress. warn: receives lines about examples that were not scored as asked."""

  def __init__(
    self,
    tasks: Sequence[LoadedTask],
    text: Text,
    mesh: jax.sharding.Mesh,
    say: Callable[[str], None],
    warn: Callable[[str], None],
  ):
    self.tasks, self._text, self._mesh, self._say, self._warn = tasks, text, mesh, say, warn

  def asked_of(self, model: LanguageModel, params: Params) -> Callable[[LoadedTask], Json]:
    """task -> the fields of `harness.Answers`, and `seconds`.

    The model is placed and compiled once, for the first task."""

    @functools.cache
    def harness_model() -> Any:
      return _harness().harness_model(
        model,
        mesh_lib.replicate(params, self._mesh),
        self._text.dataset.tokenizer,
        context=self._text.context,
        mesh=self._mesh,
        prefix=self._text.prefix,
        bos=self._text.bos,
      )

    def ask(task: LoadedTask) -> Json:
      began = time.perf_counter()
      self._say(f"task {task.name}")
      answers = _harness().ask(harness_model(), [task])
      for line in not_as_asked(answers.examples, answers.left_out):
        self._warn(line)
      return {**answers._asdict(), "seconds": time.perf_counter() - began}

    return ask


def not_as_asked(examples: Mapping[str, Json], left_out: Sequence[Json]) -> list[str]:
  """Lines about tasks of which examples were left out, or read without their beginning."""
  lines = []
  for task, counts in examples.items():
    asked = counts["scored"] + counts["left_out"]
    if counts["left_out"]:
      first = next(each for each in left_out if each["task"] == task)
      lines.append(
        f"{task}: {counts['left_out']} of {asked} examples left out of all metrics; of example "
        f"{first['example']}, {first['reason']}"
      )
    if counts["truncated"]:
      lines.append(
        f"{task}: {counts['truncated']} of {asked} examples lost the beginning of their context, "
        "which is longer than the window"
      )
  return lines


def find_tasks(
  names: Sequence[str],
  folders: Sequence[str],
  dataset: data.Dataset,
  folder: epath.Path,
  trust_code: bool = False,
) -> list[LoadedTask]:
  """Tasks of the harness, of the folders, or made from held-out text and written below `folder`.
  trust_code: run the Python that files in the folders name.

  Errors: ConfigError for tasks that are unknown, faulty, without their data or not trusted, and if
  the harness is not installed."""
  if not names:
    return []
  made = [folder / "tasks"] if set(names) & offline_tasks.HELD_OUT.keys() else []
  for path in made:
    mesh_lib.found_by_first(lambda path=path: offline_tasks.from_held_out(dataset, path))
  return _harness().load_tasks(names, [*folders, *made], trust_code=trust_code)


def _harness() -> Any:
  """The harness, imported only where tasks are asked for. Errors: ConfigError without the extra."""
  if importlib.util.find_spec("lm_eval") is None:
    raise ConfigError("--tasks: needs the library 'lm_eval'; pip install 'beyond_outliers[eval]'")
  from beyond_outliers.evaluate import harness

  return harness
