"""Tasks of the lm-evaluation-harness by name; their data are checked before any model is asked.

Needs the extra `eval`, and no torch.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2.exceptions
import lm_eval.api.task
import lm_eval.tasks.manager
import lm_eval.utils

from beyond_outliers.config import checks
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import offline_tasks, task_code
from beyond_outliers.types import Json, PathLike

# Fields of a task's configuration that say where it and its data lie.
WHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
# Types of a field's value that is not text: missing, or a date, to which the datasets library
# converts JSON strings if all look like dates.
NO_TEXT = (type(None), datetime.datetime)
TEXT = "the task asks for it; expected a text, neither missing nor only a date"
MAKE_OFFLINE = "python -m beyond_outliers.evaluate.offline_tasks"


class LoadedTask(NamedTuple):
  """One task, or all tasks of a group or tag, with their data."""

  name: str
  objects: list[Any]  # the harness's own: the tasks, or their group
  content: str  # hash of the questions and of how answers are judged
  members: dict[str, Any]  # the tasks, by name


def task_manager(
  tasks: Sequence[str], folders: Sequence[PathLike] = ()
) -> lm_eval.tasks.TaskManager:
  """The harness's tasks, groups and tags, and those of the YAML files in `folders`, which replace
  the harness's of the same name.

  If the folders have everything asked for, the harness's own fifteen thousand files are not read.
  Errors: ConfigError for an unknown name, or one that several files of the folders define."""
  missing = [folder for folder in folders if not os.path.isdir(folder)]
  checks.require(not missing, "task folders", missing, "there is no such folder")
  files, unreadable = _task_files(folders)
  for task in tasks:
    several = " and ".join(map(str, files[task]))
    checks.require(len(files[task]) < 2, "tasks", task, f"{several} define it; keep one of them")
  paths: Any = [str(folder) for folder in folders]
  manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
  if not set(tasks) <= set(manager.all_tasks):
    manager = lm_eval.tasks.TaskManager(include_path=paths)
  for task in tasks:
    if task not in manager.all_tasks:
      # cutoff 0: suggests the nearest of thousands, rather than listing them all.
      remedies = [checks.nearest(task, manager.all_tasks, cutoff=0.0)]
      if found := sorted(name for name in files if files[name]):
        remedies.append(f"--task_folders hold {', '.join(found)}")
      if task in offline_tasks.MADE:
        remedies = [f"{MAKE_OFFLINE} makes it; give its folder to --task_folders"]
      raise ConfigError("; ".join([f"tasks = {task!r}: {remedies[0]}", *remedies[1:], *unreadable]))
  return manager


def _task_files(
  folders: Sequence[PathLike],
) -> tuple[collections.defaultdict[str, list[pathlib.Path]], list[str]]:
  """({name of a task or group: the files that define it}, what is wrong with unreadable files). Of
  several that define a name, the harness would silently take the last; and skip unreadable ones."""
  files: collections.defaultdict[str, list[pathlib.Path]] = collections.defaultdict(list)
  unreadable = []
  paths = {path.resolve() for folder in folders for path in pathlib.Path(folder).rglob("*.yaml")}
  for path in sorted(path for path in paths if ".ipynb_checkpoints" not in path.parts):
    try:
      configuration = lm_eval.tasks.manager.load_yaml(path, resolve_func=False)
    except Exception as error:  # the harness's parser may raise anything
      unreadable.append(f"{path} cannot be read: {_one_line(error)}")
    else:
      # Files without a name are included by others; in a group, `task` lists its members.
      name = configuration.get("group", configuration.get("task"))
      if isinstance(name, str):
        files[name].append(path)
  return files, unreadable


def load_tasks(
  names: Sequence[str], folders: Sequence[PathLike] = (), *, trust_code: bool = False
) -> list[LoadedTask]:
  """Tasks by name, each once, with their data. folders: see `task_manager`. trust_code: run the
  Python that files in the folders name, and let their templates reach all of it (task_code.py).

  Errors: ConfigError for tasks that are unknown, faulty, without their data, or not trusted."""
  names = list(dict.fromkeys(names))
  manager = task_manager(names, folders)
  if not trust_code:
    task_code.refuse_code(manager, names, folders)
  task_code.use_templates(trust_code)
  return [_load(manager, name) for name in names]


def _load(manager: lm_eval.tasks.TaskManager, name: str) -> LoadedTask:
  try:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
      found: Any = manager.load([name])
    for task in found["tasks"].values():
      _check_examples(task)
    content = [_content(task) for _, task in sorted(found["tasks"].items())]
  except ConfigError as error:
    raise ConfigError(f"tasks = {name}: {error}") from None
  except jinja2.exceptions.SecurityError as error:
    raise ConfigError(f"tasks = {name}: a template: {error} {task_code.REMEDY}") from None
  except Exception as error:  # the harness and the datasets library may raise anything
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    raise ConfigError(
      f"tasks = {name}: {': '.join(map(_one_line, causes))}; fix its YAML file or its data; "
      f"without the hub, name tasks on local data ({MAKE_OFFLINE} makes some)"
    ) from error
  group = found.get("groups", {}).get(name)
  return LoadedTask(
    name,
    list(found["tasks"].values()) if group is None else [group],
    _digest([importlib.metadata.version("lm_eval"), group and group.to_dict(), content]),
    found["tasks"],
  )


def _one_line(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _content(task: Any) -> list[Any]:
  """All that a task's scores depend on: its configuration and documents, wherever they lie."""
  configuration = {name: value for name, value in task.dump_config().items() if name not in WHERE}
  shots = task.fewshot_docs() if task.config.num_fewshot else []
  return [configuration, [_digest(list(documents)) for documents in (task.eval_docs, shots)]]


def _digest(value: Any) -> str:
  # The repr of a function without source contains its address, which differs between runs.
  text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True, default=str))
  return hashlib.sha256(text.encode()).hexdigest()


# ---- examples


def _check_examples(task: Any) -> None:
  """Refuses data that the harness would silently accept: it writes a missing field as "None" and a
  date with a time of day, and counts an answer that is not one of the choices as wrong.

  Errors: ConfigError that names the first such example, from 0."""
  if not isinstance(task, lm_eval.api.task.ConfigurableTask):
    return  # a task of its own Python class, which knows its data
  own = callable(task.config.process_results)
  asked = (task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice)
  fields = [name for name in asked if isinstance(name, str) and name in task.features]
  templates = [
    lm_eval.utils.env.overlay(finalize=_asked).from_string(template)
    for template in asked
    if isinstance(template, str) and template not in fields
  ]
  documents: Any = task.eval_docs
  for number, document in enumerate(documents):
    unasked = [name for name, value in document.items() if isinstance(value, NO_TEXT)]
    try:
      for name in unasked:
        checks.require(name not in fields, name, document[name], TEXT)
      if unasked:
        for template in templates:
          template.render(**document)
      if task.OUTPUT_TYPE == "multiple_choice" and not own:
        _check_choices(task, document)
    except ConfigError as error:
      raise ConfigError(f"example {number} of {task.config.task}: {error}") from None


def _asked(value: Any) -> Any:
  """A value that a template prints, unchanged. Errors: ConfigError for a missing one or a date."""
  checks.require(not isinstance(value, NO_TEXT), "a field in a template", value, TEXT)
  return value


def _check_choices(task: Any, document: Json) -> None:
  choices, text = task.doc_to_choice(document), task.doc_to_text(document)
  checks.require(
    isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices),
    "choices",
    choices,
    "expected two or more texts",
  )
  # Where the choices are contexts, doc_to_text gives the answer.
  remedy = "digits alone are read as the number of a choice; add words"
  checks.require(task.multiple_input or isinstance(text, str), "context", text, remedy)
  answer = text if task.multiple_input else task.doc_to_target(document)
  answers = answer if isinstance(answer, list) else [answer]
  known = [
    (isinstance(a, int) and 0 <= a < len(choices)) or (isinstance(a, str) and a in choices)
    for a in answers
  ]
  checks.require(
    bool(known) and all(known),
    "answer",
    answer,
    f"expected the number of one of the {len(choices)} choices, from 0, or its text",
  )
