"""Code in other people's task files: refused before the harness reads them and would run it.

A task file looks like data, but the harness calls functions and instantiates classes that it names,
loads metrics as programs, and gives its templates access to all of Python. None of that happens
here unless the files are trusted. The harness's own tasks are part of an installed library, and so
are trusted.

Needs the extra `eval`, and no torch.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2.sandbox
import lm_eval.api.metrics  # importing it fills the registry
import lm_eval.api.registry
import lm_eval.tasks
import lm_eval.utils
import yaml

from beyond_outliers.errors import ConfigError
from beyond_outliers.types import Json, PathLike

HARNESS = pathlib.Path(lm_eval.tasks.__file__).resolve().parent
REMEDY = "read it, and if you trust it, give --trust_task_code"
# Fields that make the harness run something, whatever their value.
RUNNING = ("class", "custom_dataset", "unsafe_code", "use_prompt")
# Formats of the datasets library whose readers import what a file names, or unpickle.
RUNNING_DATA = ("generator", "iceberg", "pandas", "spark", "sql")

TEMPLATES = lm_eval.utils.env
# Attributes that begin with an underscore are out of reach, and with them the rest of Python.
SANDBOX = jinja2.sandbox.SandboxedEnvironment(
  undefined=TEMPLATES.undefined, keep_trailing_newline=TEMPLATES.keep_trailing_newline
)
SANDBOX.filters.update(TEMPLATES.filters)


# pyrefly: ignore[invalid-inheritance]  (the harness's parser, where libyaml is installed)
class _Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
  """Reads plain values, and refuses !function."""


def _refuse_function(reader: Any, node: yaml.Node) -> None:
  del reader
  raise ConfigError(f"names a function, {node.tag} {node.value}, which would be called; {REMEDY}")


_Reader.add_constructor("!function", _refuse_function)


def use_templates(trusted: bool) -> None:
  """Has the harness fill in templates with access to all of Python if trusted, else sandboxed."""
  lm_eval.utils.env = TEMPLATES if trusted else SANDBOX


def refuse_code(
  manager: lm_eval.tasks.TaskManager, names: Sequence[str], folders: Sequence[PathLike]
) -> None:
  """Refuses tasks, groups and tags, given by name, whose files would run something.

  folders: where included files may lie. Errors: ConfigError that names the file and field."""
  inside = [pathlib.Path(folder).resolve() for folder in folders]
  seen: set[pathlib.Path] = set()
  for path in sorted(_files(manager, names)):
    if not path.is_relative_to(HARNESS):
      _check_file(path, inside, seen)


def _files(manager: lm_eval.tasks.TaskManager, names: Sequence[str]) -> set[pathlib.Path]:
  """Files that define these names, and all members of groups and tags among them."""
  files, visited, pending = set(), set(), list(names)
  while pending:
    name = pending.pop()
    entry = manager.task_index.get(name)
    if entry is None or name in visited:
      continue
    visited.add(name)
    if entry.yaml_path is not None:
      files.add(entry.yaml_path.resolve())
    pending += [*entry.tags] if entry.yaml_path is None else _members(entry.cfg or {})
  return files


def _members(fields: Json) -> list[str]:
  """Names that a group's definition refers to, nested groups included."""
  found = []
  for each in _definitions(fields):
    members = each.get("task")
    listed = members if isinstance(members, list) else [members, each.get("group")]
    found += [member for member in listed if isinstance(member, str)]
  return found


def _definitions(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """A definition, and the definitions of members nested in it."""
  yield fields
  members = fields.get("task")
  for member in members if isinstance(members, list) else ():
    if isinstance(member, Mapping):
      yield from _definitions(member)


def _check_file(path: pathlib.Path, folders: list[pathlib.Path], seen: set[pathlib.Path]) -> None:
  if path in seen:
    return
  seen.add(path)
  try:
    with path.open("rb") as file:
      fields = yaml.load(file, _Reader)
    for definition in _definitions(fields):
      _check_definition(definition)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from None
  except (OSError, yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
    reason = " ".join(str(error).split())
    raise ConfigError(f"{path}: cannot be read ({reason}); fix it") from None
  included = fields.get("include", [])
  for name in included if isinstance(included, list) else [included]:
    file = (path.parent / str(name)).resolve()
    if not any(file.is_relative_to(folder) for folder in folders):
      raise ConfigError(f"{path}: include = {name!r}: is in none of --task_folders; {REMEDY}")
    _check_file(file, folders, seen)


def _check_definition(fields: Mapping[str, Any]) -> None:
  for field in RUNNING:
    _require_none(fields.get(field), field, "would run code")
  options = fields.get("dataset_kwargs")
  if isinstance(options, Mapping):
    trusts = options.get("trust_remote_code")
    _require_none(
      trusts, "dataset_kwargs.trust_remote_code", "would run code that comes with the data"
    )
  source = fields.get("dataset_path")
  if isinstance(source, str) and _runs(source):
    _require_none(source, "dataset_path", "is a program that would be run")
  metrics = fields.get("metric_list")
  for metric in metrics if isinstance(metrics, list) else ():
    name = metric.get("metric") if isinstance(metric, Mapping) else None
    if isinstance(name, str) and (
      metric.get("hf_evaluate") or name not in lm_eval.api.registry.metric_registry
    ):
      _require_none(
        name, "metric_list", "is not one of the harness's, and would be run as a program"
      )


def _require_none(value: Any, field: str, what: str) -> None:
  if value not in (None, False):
    raise ConfigError(f"{field} = {value!r}: {what}; {REMEDY}")


def _runs(source: str) -> bool:
  """Whether the datasets library runs a data source: RUNNING_DATA, a script, a folder with one."""
  if source in RUNNING_DATA or source.endswith(".py"):
    return True
  return os.path.isdir(source) and any(name.endswith(".py") for name in os.listdir(source))
