"""Resolution of a config: from nested dictionaries to a checked `Config`, and back."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from beyond_outliers.config.checks import MINIMUM, check_own_number, require, unknown_key
from beyond_outliers.config.files import expand_home
from beyond_outliers.config.hyperparameters import Section
from beyond_outliers.config.optimizers import OPTIMIZERS
from beyond_outliers.config.overrides import check_steps, flatten
from beyond_outliers.config.run import Config
from beyond_outliers.config.sections import Group, OptimizerGroups
from beyond_outliers.errors import ConfigError

# Keys that a resumed run may change: they affect no result beyond the order of float sums.
MAY_CHANGE = (
  "mesh",
  "distributed",
  "log",
  "checkpoint",
  "average.last",
  "max_skipped_updates",
  "data.directory",
  "data.path",  # the fingerprint of its contents is compared
  "data.prefetch",
  "model.remat",
  "model.unroll",
  "model.attention",
  "micro_batches",  # except where gradients are quantized: train/initialize.py
  "eval.batch_size",
)

# Keys that name files -> whether after a colon, as in sentencepiece:FILE.
PATHS = {
  "warm_start": False,
  "data.path": False,
  "data.directory": False,
  "data.tokenizer": True,
  "data.validation": True,
}


def resolve(config: Any) -> Config:
  """A ConfigDict, or a plain nested dict, as a checked `Config`.

  Errors: ConfigError (unknown key, type, value)."""
  require(hasattr(config, "keys"), "config", config, "expected a dictionary of sections")
  # These first, since values in the sections are derived from them.
  for field in MINIMUM:
    check_own_number(field, config.get(field))
  if hasattr(config, "get_ref"):  # a ConfigDict, in which values may be derived from others
    check_steps(config)
  return _build(Config, _plain(config), "")


def to_dict(config: Config) -> dict[str, Any]:
  """The inverse of `resolve`: plain JSON types, every value written out."""
  tree = dataclasses.asdict(config)
  groups = {
    label: {
      **{key: value for key, value in group.items() if key != "optimizer"},
      **group["optimizer"],
    }
    for label, group in tree["optimizer"]["groups"].items()
  }
  return {**tree, "optimizer": {**tree["optimizer"]["default"], "groups": groups}}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """{dotted key: (old, new)} where two configurations differ."""
  flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
  return {
    key: (flat_old.get(key), flat_new.get(key))
    for key in sorted(flat_old.keys() | flat_new.keys())
    if flat_old.get(key) != flat_new.get(key)
  }


def check_resumable(old: Config, new: Config) -> None:
  """Refuses to resume the run of `old` under `new` if that would train another model.

  Errors: ConfigError with the differing keys."""
  clash = {
    key: pair
    for key, pair in differences(old, new).items()
    if not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)
  }
  if clash:
    lines = "\n".join(
      f"  {key}: {was!r} in the workdir, {now!r} now" for key, (was, now) in clash.items()
    )
    raise ConfigError(
      "the workdir holds a run of another configuration; give another --workdir (of a sweep: "
      f"--root), or move it away. They differ in\n{lines}"
    )


def _with_home(value: str, field: str) -> str:
  """A path, or NAME:PATH, with a leading ~ expanded. Errors: ConfigError."""
  name, colon, path = value.partition(":") if PATHS[field] else ("", "", value)
  try:
    return name + colon + expand_home(path)
  except ValueError as error:
    raise ConfigError(f"{field} = {value!r}: {error}") from None


def _plain(node: Any) -> Any:
  """Nested plain dicts from a ConfigDict, with references resolved and the order kept."""
  return {key: _plain(node[key]) for key in node.keys()} if hasattr(node, "keys") else node


def _build(cls: type, values: Any, path: str) -> Any:
  if cls is OptimizerGroups:
    return _build_optimizer(values)
  require(
    isinstance(values, Mapping),
    path.rstrip(".") or "config",
    values,
    f"expected the section {cls.__name__}",
  )
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in hints:
      raise ConfigError(unknown_key(path + key, key, hints))
  for field in dataclasses.fields(cls):
    # Keys younger than recorded runs have a default, what these runs did: their configs resolve.
    if field.name not in values and field.default is dataclasses.MISSING:
      raise ConfigError(f"{path}{field.name}: missing; see its comment in configs/")
  return cls(**{key: _typed(hints[key], value, path + key) for key, value in values.items()})


def _build_optimizer(values: Any) -> OptimizerGroups:
  """The optimizer's own section, and each group's. Errors: ConfigError."""
  require(isinstance(values, Mapping), "optimizer", values, "expected a section with a name")
  groups = values.get("groups")
  require(
    isinstance(groups, Mapping) and bool(groups),
    "optimizer.groups",
    groups,
    "expected {label: {paths: regex, ...}}",
  )
  own = {key: value for key, value in values.items() if key != "groups"}
  default = _build_section(own, "optimizer.")
  if "vector" in groups and "scale" not in groups:
    # An older config, from when learned scales belonged to the group of vectors.
    groups = {"scale": {**groups["vector"], "paths": r".*/log_scale", "optional": True}, **groups}
  path = "optimizer.groups."
  return OptimizerGroups(default, {k: _build_group(v, own, path + k) for k, v in groups.items()})


def _build_group(values: Any, inherited: Mapping[str, Any], path: str) -> Group:
  """A group: its keys override the optimizer's; if it names another optimizer, it has all keys."""
  require(isinstance(values, Mapping), path, values, "expected {paths: regex, ...}")
  name = values.get("name", inherited["name"])
  keys = {**(inherited if name == inherited["name"] else {}), **values, "name": name}
  paths = _typed(str, keys.pop("paths", None), f"{path}.paths")
  optional = _typed(bool, keys.pop("optional", False), f"{path}.optional")
  try:
    re.compile(paths)
  except re.error as error:
    raise ConfigError(f"{path}.paths = {paths!r}: not a regular expression ({error})") from None
  return Group(paths, _build_section(keys, f"{path}."), optional)


def _build_section(values: Mapping[str, Any], prefix: str) -> Section:
  """The section of the optimizer that the values name; checked."""
  name = values.get("name")
  if not isinstance(name, str) or name not in OPTIMIZERS:
    raise ConfigError(f"{prefix}name = {name!r}: expected one of " + ", ".join(OPTIMIZERS))
  return _build(OPTIMIZERS[name], values, prefix).check(prefix)


def _typed(kind: Any, value: Any, path: str) -> Any:
  if isinstance(value, str) and path in PATHS:
    value = _with_home(value, path)
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, path + ".")
  if typing.get_origin(kind) is dict:
    require(isinstance(value, Mapping), path, value, "expected a section of sections")
    return {
      label: _typed(typing.get_args(kind)[1], part, f"{path}.{label}")
      for label, part in value.items()
    }
  alternatives = [k for k in typing.get_args(kind) if k is not type(None)]
  if alternatives:  # X | None
    return None if value is None else _typed(alternatives[0], value, path)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
  require(fits, path, value, f"expected {kind.__name__}, got {type(value).__name__}")
  return value
