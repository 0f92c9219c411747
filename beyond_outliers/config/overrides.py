"""Overrides of a config by dotted key, and the argument behind the colon of --config."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from beyond_outliers.config.checks import check_own_number, require, unknown_key
from beyond_outliers.config.sections import QuantRule
from beyond_outliers.config.sizes import SIZES
from beyond_outliers.errors import ConfigError


def parse_argument(arg: str) -> tuple[str, dict[str, Any]]:
  """(size, {dotted key: value}) of `size,key=value,...`, the argument behind the colon of --config.
  The default size is nano."""
  parts = [part for part in (arg or "").split(",") if part]
  size = parts.pop(0) if parts and "=" not in parts[0] else "nano"
  require(size in SIZES, "size", size, "expected one of " + ", ".join(SIZES))
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
  """Sets dotted keys of a ConfigDict in place; a new name below quant.rules is a further rule,
  behind those that are there.

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
      # A ConfigDict makes a number of a bool where it holds a float.
      if isinstance(value, bool) and isinstance(node.get(rest[-1]), float):
        raise TypeError
      node[rest[-1]] = value
    except TypeError:
      kind = type(node[rest[-1]]).__name__
      raise ConfigError(f"{key} = {value!r}: expected {kind}, got {type(value).__name__}") from None
  return config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted key: value} of a nested dictionary."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
