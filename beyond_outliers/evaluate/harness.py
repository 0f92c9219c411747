"""Adapter of models to the lm-evaluation-harness: a model as its `LM`, its tasks, and their scores.

Needs the extra `eval`, and no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from beyond_outliers.config import checks
from beyond_outliers.data import tokenizers
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import loglikelihood
from beyond_outliers.types import LanguageModel, Params, PathLike

try:
  import lm_eval
  import lm_eval.api.model
  import lm_eval.models.utils
  import lm_eval.tasks
  import lm_eval.utils
except ImportError as error:
  raise ConfigError(
    "--tasks: needs the library 'lm_eval'; pip install 'beyond_outliers[eval]'"
  ) from error

Scores = dict[str, dict[str, float]]

# Resamples behind the standard errors that have no formula, such as perplexity's.
BOOTSTRAPS = 1000
# Of a task's configuration: where it and its data lie.
WHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
GENERATED = 256  # tokens at most where a task doesn't say, or half the window where that is less


class LoadedTask(NamedTuple):
  """A task by its name, or all those of a group or tag, with their data."""

  name: str
  objects: list[Any]  # of the harness
  content: str  # hash of the questions and how answers are judged


class HarnessModel(lm_eval.api.model.TemplateLM):
  """The harness's questions in strings, answered by a `loglikelihood.Scorer`.

  prefix: the id that stands before a text without a context, as between documents in training. bos:
  whether it stands before every text, as before every document in training; it is not doubled. As
  with the harness's Hugging Face model, contexts too long for the window lose their beginning, and
  a context's trailing spaces are encoded with the continuation. Generation is greedy, and ends with
  the text or where another would begin.
  Errors: ConfigError for a task that samples, or that wants more tokens than the window has."""

  def __init__(
    self,
    scorer: loglikelihood.Scorer,
    tokenizer: tokenizers.Tokenizer,
    prefix: int,
    bos: bool = False,
  ):
    super().__init__()
    self._scorer, self._tokenizer, self._prefix, self._bos = scorer, tokenizer, prefix, bos
    self._ends = {self.eot_token_id, prefix}

  @property
  def eot_token_id(self):
    return self._prefix if self._tokenizer.eot is None else self._tokenizer.eot

  @property
  def prefix_token_id(self):
    return self._prefix

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    ids = self._tokenizer.encode(string).tolist()
    begins = self._bos and add_special_tokens is not False and ids[:1] != [self._prefix]
    return [self._prefix, *ids] if begins else ids

  def loglikelihood(self, requests, disable_tqdm=True):
    return super().loglikelihood(requests, disable_tqdm)

  def _loglikelihood_tokens(self, requests, **kwargs):
    results = self._scorer.score(
      [loglikelihood.Pair(context, continuation) for _, context, continuation in requests]
    )
    return self._cached("loglikelihood", [texts for texts, _, _ in requests], results)

  def loglikelihood_rolling(self, requests, disable_tqdm=True):
    # The prefix is put before each window.
    texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
    windows = [
      [
        loglikelihood.Pair(*lm_eval.utils.make_disjoint_window(window))
        for window in lm_eval.utils.get_rolling_token_windows(
          text, self._prefix, self._scorer.context, context_len=1
        )
      ]
      for text in texts
    ]
    scores = iter(self._scorer.score([window for each in windows for window in each]))
    results = [sum(next(scores)[0] for _ in each) for each in windows]
    return self._cached("loglikelihood_rolling", [request.args for request in requests], results)

  def generate_until(self, requests, disable_tqdm=True):
    settings = [self._generation_settings(request.args[1]) for request in requests]

    def text(number, ids):
      return cut(self._tokenizer.decode(until(ids, self._ends)), settings[number]["until"])

    def ended(number, ids):
      whole = self._tokenizer.decode(ids)
      return not self._ends.isdisjoint(ids) or cut(whole, settings[number]["until"]) != whole

    generated = self._scorer.generate(
      [self.tok_encode(request.args[0]) or [self._prefix] for request in requests],
      [setting["max_gen_toks"] for setting in settings],
      ended,
    )
    results = [text(number, ids) for number, ids in enumerate(generated)]
    return self._cached("generate_until", [request.args for request in requests], results)

  def _generation_settings(self, settings):
    window = self._scorer.context
    whole = lm_eval.models.utils.normalize_gen_kwargs(settings, min(GENERATED, window // 2))
    field, limit = "generation_kwargs.max_gen_toks", whole["max_gen_toks"]
    remedy = f"expected 1 to {window - 1}, one below the window"
    checks.require(0 < limit < window, field, limit, remedy)
    field, remedy = "generation_kwargs.do_sample", "only greedy generation; set it to false"
    checks.require(not whole["do_sample"], field, True, remedy)
    return whole

  def _cached(self, method, keys, results):
    for key, result in zip(keys, results, strict=True):
      self.cache_hook.add_partial(method, key, result)
    return results


def until(ids: list[int], ends: set[int]) -> list[int]:
  """The ids before the first that ends a text."""
  return list(itertools.takewhile(lambda i: i not in ends, ids))


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of the stop strings."""
  ends = [text.find(stop) for stop in stops if stop and stop in text]
  return text[: min(ends, default=len(text))]


def task_manager(
  tasks: Sequence[str], folders: Sequence[PathLike] = ()
) -> lm_eval.tasks.TaskManager:
  """The harness's tasks, groups and tags, and those of the YAML files in `folders`, which replace
  its own of the same name.

  Where the folders have all that is asked for, the harness's own fifteen thousand files stay
  unread.
  Errors: ConfigError for a name that nobody knows."""
  missing = [folder for folder in folders if not os.path.isdir(folder)]
  checks.require(not missing, "task folders", missing, "there is no such folder")
  paths: Any = [str(folder) for folder in folders]
  manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
  if not set(tasks) <= set(manager.all_tasks):
    manager = lm_eval.tasks.TaskManager(include_path=paths)
  for task in tasks:
    # cutoff 0: the nearest of thousands, rather than all of them.
    checks.require(
      task in manager.all_tasks, "tasks", task, checks.nearest(task, manager.all_tasks, cutoff=0.0)
    )
  return manager


def load_tasks(names: Sequence[str], folders: Sequence[PathLike] = ()) -> list[LoadedTask]:
  """Tasks by name, with their data; folders: see `task_manager`.

  Errors: ConfigError for tasks that are unknown, faulty or without their data."""
  manager = task_manager(names, folders)
  return [_load(manager, name) for name in names]


def _load(manager: lm_eval.tasks.TaskManager, name: str) -> LoadedTask:
  try:
    with contextlib.redirect_stdout(sys.stderr):  # results alone go to stdout
      found: Any = manager.load([name])
    content = [_content(task) for _, task in sorted(found["tasks"].items())]
  except Exception as error:  # the harness and its library of data raise whatever there is
    raise ConfigError(
      f"tasks = {name}: {type(error).__name__}: {' '.join(str(error).split())}; mend its YAML file "
      "or its data; without the hub, name tasks on local data"
    ) from error
  group = found.get("groups", {}).get(name)
  return LoadedTask(
    name,
    list(found["tasks"].values()) if group is None else [group],
    _digest([importlib.metadata.version("lm_eval"), group and group.to_dict(), content]),
  )


def _content(task: Any) -> list[Any]:
  """All that a task's answers are of: its configuration and documents, wherever they lie."""
  configuration = {name: value for name, value in task.dump_config().items() if name not in WHERE}
  shots = task.fewshot_docs() if task.config.num_fewshot else []
  return [configuration, [_digest(list(documents)) for documents in (task.eval_docs, shots)]]


def _digest(value: Any) -> str:
  # Functions that have no source are written with their place in memory.
  text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True, default=str))
  return hashlib.sha256(text.encode()).hexdigest()


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
  """{task: {metric: value, metric_stderr: value}} under the model contract; zero-shot, unless a
  task itself says otherwise.

  Of a group or tag each task has a row. tasks, limit: as `ask` takes them; the others as
  `harness_model`."""
  return ask(
    harness_model(model, params, tokenizer, context=context, mesh=mesh, prefix=prefix, bos=bos),
    tasks,
    limit,
  )


def harness_model(
  model: LanguageModel,
  params: Params,
  tokenizer: tokenizers.Tokenizer,
  *,
  context: int,
  mesh: jax.sharding.Mesh | None = None,
  prefix: int | None = None,
  bos: bool = False,
) -> HarnessModel:
  """A model that any number of tasks is asked of: its programs are compiled once for all.

  context, mesh: as `loglikelihood.Scorer` takes them. prefix, bos: as `HarnessModel` does; prefix
  by default the tokenizer's token that ends a text (with bos: begins it), or else the other."""
  marks = (tokenizer.bos, tokenizer.eot) if bos else (tokenizer.eot, tokenizer.bos)
  prefix = next((i for i in (prefix, *marks) if i is not None), None)
  if prefix is None:
    raise ConfigError(
      "prefix = None: the tokenizer has no token that ends or begins a text; name one"
    )
  return HarnessModel(
    loglikelihood.Scorer(model, params, context=context, mesh=mesh), tokenizer, prefix, bos
  )


def ask(model: HarnessModel, tasks: Sequence[LoadedTask], limit: int | None = None) -> Scores:
  """Scores of loaded tasks, as `score_tasks`.

  tasks: as `load_tasks` makes them, any number of times. limit: only the first so many examples of
  each task."""
  # Its bootstrap would fork this process, whose threads may then hang.
  os.environ["DISABLE_MULTIPROC"] = "1"
  with contextlib.redirect_stdout(sys.stderr):
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
  return {
    task: {
      key.removesuffix(",none"): float(value)
      for key, value in metrics.items()
      if "," in key and isinstance(value, int | float)
    }
    for task, metrics in found["results"].items()
  }
