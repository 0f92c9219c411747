"""Sweeps of config files: lists of overrides, and names of the resulting runs.

def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [1e-3, 3e-3]), h.sweep("seed", range(3))])
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

Overrides = dict[str, Any]  # {dotted config key: value}


def sweep(key: str, values: Iterable[Any]) -> list[Overrides]:
  """One run per value."""
  return [{key: value} for value in values]


def fixed(key: str, value: Any) -> list[Overrides]:
  """One value for every run that it is combined with."""
  return [{key: value}]


def product(sweeps: Sequence[list[Overrides]]) -> list[Overrides]:
  """Every combination; the last sweep varies fastest. Errors: ValueError for a key set twice."""
  return [_merge(combination) for combination in itertools.product(*sweeps)]


def zipit(sweeps: Sequence[list[Overrides]]) -> list[Overrides]:
  """The first runs of all combined, the second, ... Errors: ValueError for unequal lengths."""
  lengths = [len(s) for s in sweeps]
  if len(set(lengths)) > 1:
    raise ValueError(f"zipit: sweeps of lengths {lengths}: expected equal lengths")
  return [_merge(combination) for combination in zip(*sweeps, strict=True)]


def chainit(sweeps: Sequence[list[Overrides]]) -> list[Overrides]:
  """One sweep after another."""
  return [dict(overrides) for s in sweeps for overrides in s]


def run_name(overrides: Overrides) -> str:
  """A run's name, usable for a folder, that does not depend on the order of overrides."""
  parts = [
    f"{key.split('.')[-1] if _short(key, overrides) else key}={overrides[key]}"
    for key in sorted(overrides)
  ]
  return re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", ",".join(parts)) or "default"


def _short(key: str, overrides: Overrides) -> bool:
  last = key.split(".")[-1]
  return sum(other.split(".")[-1] == last for other in overrides) == 1


def _merge(combination: Iterable[Overrides]) -> Overrides:
  merged: Overrides = {}
  for overrides in combination:
    twice = merged.keys() & overrides.keys()
    if twice:
      raise ValueError(f"sweep: {sorted(twice)[0]!r} is set twice")
    merged.update(overrides)
  return merged
