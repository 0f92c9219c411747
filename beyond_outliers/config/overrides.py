"""Overrides of a config by dotted key, and the argument after the colon of --config."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from beyond_outliers.config.checks import check_own_number, require, require_once, unknown_key
from beyond_outliers.config.sections import QuantRule
from beyond_outliers.config.sizes import SIZES
from beyond_outliers.errors import ConfigError

# Switches that change the number of parameters -> their values for which configs/ counts them.
COUNTED = {"mlp": "relu2", "tied": True}


def parse_argument(arg: str) -> tuple[str, dict[str, Any]]:
  """(size, {dotted key: value}) from `size,key=value,...`, the argument after the colon of
  --config. The default size is nano. Errors: ConfigError."""
  parts = [part for part in (arg or "").split(",") if part]
  size = parts.pop(0) if parts and "=" not in parts[0] else "nano"
  require(size in SIZES, "size", size, "expected one of " + ", ".join(SIZES))
  require_once("config argument", [part.partition("=")[0] for part in parts])
  overrides = {}
  for part in parts:
    key, equals, text = part.partition("=")
    require(bool(equals), "config argument", part, "expected key=value after the size")
    try:
      overrides[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      overrides[key] = {"true": True, "false": False}.get(text.lower(), text)
  return size, overrides


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
  """Sets dotted keys of a ConfigDict in place and returns it; a new name below quant.rules adds a
  rule after the existing ones.

  Errors: ConfigError with the nearest key, or the expected type."""
  for key, value in overrides.items():
    check_own_number(key, value)
    node, *rest = config, *key.split(".")
    for depth, name in enumerate(rest):
      known = node.keys() if hasattr(node, "keys") else ()
      if rest[:depth] == ["quant", "rules"] and name not in known and depth + 1 < len(rest):
        rule = {field.name: "" for field in dataclasses.fields(QuantRule)}
        with node.unlocked():
          node[name] = type(node)(rule).lock()
      elif name not in known:
        raise ConfigError(unknown_key(".".join(rest[: depth + 1]), name, known))
      if depth + 1 < len(rest):
        node = node[name]
    try:
      # A ConfigDict would convert a bool to a number where it holds a float.
      if isinstance(value, bool) and isinstance(node.get(rest[-1]), float):
        raise TypeError
      node[rest[-1]] = value
    except TypeError:
      kind = type(node[rest[-1]]).__name__
      raise ConfigError(f"{key} = {value!r}: expected {kind}, got {type(value).__name__}") from None
  check_overrides(config, overrides)
  return config


def check_overrides(config: Any, overrides: Mapping[str, Any]) -> None:
  """Refuses overrides, already set in a ConfigDict, that mislabel the model's size or have no
  effect. Errors: ConfigError."""
  remedy = "give the size after the colon, as in --config=configs/adamw.py:50m"
  require("size" not in overrides, "size", overrides.get("size"), remedy)
  if "tokens_per_parameter" in overrides:
    remedy = (
      f"steps = {config.steps} is set, so this would have no effect; leave one of the two out"
    )
    require(_steps_follow(config), "tokens_per_parameter", config.tokens_per_parameter, remedy)


def check_steps(config: Any) -> None:
  """Refuses a ConfigDict whose steps follow tokens_per_parameter by another model's number of
  parameters. Errors: ConfigError."""
  for name, value in COUNTED.items():
    ours = config.model[name]
    if ours != value and _steps_follow(config):
      remedy = f"tokens_per_parameter gives the steps for {value!r} only; set steps, too"
      require(False, f"model.{name}", ours, remedy)


def _steps_follow(config: Any) -> bool:
  """Whether a ConfigDict's steps are derived from its tokens_per_parameter."""
  trial = copy.deepcopy(config)
  try:
    trial.tokens_per_parameter = 2 * trial.tokens_per_parameter + 1000
  except AttributeError:  # it is frozen
    return False
  return trial.steps != config.steps


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted key: value} of a nested dictionary."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
