"""Tasks of an evaluation job, and one model's answers to them, through the harness."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from beyond_outliers import data
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.evaluate import offline_tasks
from beyond_outliers.evaluate.target import Text
from beyond_outliers.types import Json, LanguageModel, Params

if TYPE_CHECKING:  # needs the extra `eval`
  from beyond_outliers.evaluate.harness import LoadedTask


class TaskSuite:
  """Asks the same tasks of any number of models, which read as `text` begins."""

  def __init__(
    self,
    tasks: Sequence[LoadedTask],
    text: Text,
    mesh: jax.sharding.Mesh,
    say: Callable[[str], None],
  ):
    self.tasks, self._text, self._mesh, self._say = tasks, text, mesh, say

  def asked_of(self, model: LanguageModel, params: Params) -> Callable[[LoadedTask], Json]:
    """task -> its `scores` and `seconds`. The model is placed and compiled once, at the first."""

    @functools.cache
    def harness_model() -> Any:
      return _harness().harness_model(
        model,
        jax.device_put(params, mesh_lib.replicated(self._mesh)),
        self._text.dataset.tokenizer,
        context=self._text.context,
        mesh=self._mesh,
        prefix=self._text.prefix,
        bos=self._text.bos,
      )

    def ask(task: LoadedTask) -> Json:
      began = time.perf_counter()
      self._say(f"task {task.name}")
      scores = _harness().ask(harness_model(), [task])
      return {"scores": scores, "seconds": time.perf_counter() - began}

    return ask


def find_tasks(
  names: Sequence[str], folders: Sequence[str], dataset: data.Dataset, folder: epath.Path
) -> list[LoadedTask]:
  """Tasks of the harness, of the folders, or made of held-out text below `folder`.

  Errors: ConfigError for tasks that are unknown, faulty or without their data, and for any without
  the library for them."""
  if not names:
    return []
  made = [folder / "tasks"] if set(names) & offline_tasks.HELD_OUT.keys() else []
  for path in made:
    offline_tasks.from_held_out(dataset, path)
  return _harness().load_tasks(names, [*folders, *made])


def _harness() -> Any:
  """The harness, imported only where tasks are asked for: it needs the extra `eval`."""
  from beyond_outliers.evaluate import harness

  return harness
