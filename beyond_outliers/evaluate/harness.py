"""Scores of models on tasks of the lm-evaluation-harness.

Needs the extra `eval`, and no torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import lm_eval
import lm_eval.tasks

from beyond_outliers.data import tokenizers
from beyond_outliers.errors import TaskError
from beyond_outliers.evaluate.harness_lm import Example, HarnessModel, harness_model
from beyond_outliers.evaluate.harness_tasks import LoadedTask, load_tasks, task_manager
from beyond_outliers.evaluate.task_suite import Answers, Scores
from beyond_outliers.types import Json, LanguageModel, Params

__all__ = [
  "Answers",
  "HarnessModel",
  "LoadedTask",
  "ask",
  "harness_model",
  "load_tasks",
  "score_tasks",
  "task_manager",
]

# Resamples for standard errors that have no formula, such as perplexity's.
BOOTSTRAPS = 1000
LISTED = 20  # left-out examples listed per task; all are counted


def score_tasks(
  model: LanguageModel,
  params: Params,
  tokenizer: tokenizers.Tokenizer,
  tasks: Sequence[LoadedTask],
  *,
  context: int,
  mesh: jax.sharding.Mesh | None = None,
  limit: int | None = None,
  prefix: int | None = None,
  bos: bool = False,
) -> Scores:
  """{task: {metric: value, metric_stderr: value}} under the model contract; zero-shot, unless the
  task itself says otherwise.

  Every task of a group or tag has its own entry. tasks, limit: see `ask`; the others: see
  `harness_model`."""
  return ask(
    harness_model(model, params, tokenizer, context=context, mesh=mesh, prefix=prefix, bos=bos),
    tasks,
    limit,
  ).scores


def ask(model: HarnessModel, tasks: Sequence[LoadedTask], limit: int | None = None) -> Answers:
  """Scores of loaded tasks, and the examples that they are over.

  An example without a score is left out of all metrics, rather than counted as wrong.

  tasks: from `load_tasks`; they can be asked any number of times. limit: only that many examples of
  each task, the first ones. Errors: TaskError for a task none of whose examples has a score."""
  model.forget()
  members = {name: task for each in tasks for name, task in each.members.items()}
  # The harness's bootstrap would fork this process, whose threads might then hang.
  os.environ["DISABLE_MULTIPROC"] = "1"
  with contextlib.redirect_stdout(sys.stderr), scored_only(members, model.left_out):
    found: Any = lm_eval.simple_evaluate(
      model,
      tasks=[each for task in tasks for each in task.objects],
      limit=limit,
      log_samples=False,
      task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
      bootstrap_iters=BOOTSTRAPS,
      torch_random_seed=None,
    )
  # The harness writes `acc,none` and `acc_stderr,none` where no filter has a name.
  scores = {
    task: {
      key.removesuffix(",none"): float(value)
      for key, value in metrics.items()
      if "," in key and isinstance(value, int | float)
    }
    for task, metrics in found["results"].items()
  }
  left_out = sorted(model.left_out.items())
  listed = [
    {"task": name, "example": number, "reason": reason}
    for task in members
    for (name, number), reason in [item for item in left_out if item[0][0] == task][:LISTED]
  ]
  return Answers(scores, {name: _counts(model, task) for name, task in members.items()}, listed)


def _counts(model: HarnessModel, task: Any) -> Json:
  asked = {(instance.task_name, instance.doc_id) for instance in task.instances}
  left_out = asked & model.left_out.keys()
  return {
    # Tasks of their own Python class don't name their splits.
    "split": task.config.test_split
    or task.config.validation_split
    or ("test" if task.has_test_docs() else "validation"),
    "scored": len(asked - left_out),
    "left_out": len(left_out),
    "truncated": len((asked - left_out) & model.truncated),
  }


@contextlib.contextmanager
def scored_only(tasks: Mapping[str, Any], left_out: Mapping[Example, str]) -> Iterator[None]:
  """Has the harness judge only the examples that are not in `left_out`.

  It iterates over a task's documents twice: to ask the model, filling `left_out`, and to judge."""

  def documents(name, original, **chosen):
    asked = list(original(**chosen))
    scored = [(number, document) for number, document in asked if (name, number) not in left_out]
    if asked and not scored:
      reason = left_out[name, asked[0][0]]
      raise TaskError(f"{name}: none of {len(asked)} examples has a score; for the first, {reason}")
    return scored

  for name, task in tasks.items():
    task.doc_iterator = functools.partial(documents, name, task.doc_iterator)
  try:
    yield
  finally:
    for task in tasks.values():
      del task.doc_iterator
