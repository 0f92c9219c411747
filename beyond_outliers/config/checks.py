"""Checks of configuration values: every error names the field, the value and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from typing import Any

from beyond_outliers.errors import ConfigError

# Least values of a run's own numbers, outside the sections.
MINIMUM = dict(
  seed=0,
  steps=1,
  batch_size=1,
  micro_batches=1,
  context=1,
  tokens_per_parameter=0,
  max_skipped_updates=1,
)
LARGEST_SEED = 2**32 - 1  # JAX's keys use no more bits of a seed
MAXIMUM = {"seed": (LARGEST_SEED, "the largest seed that random keys can hold")}


def nearest(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
  """The remedy for an unknown name: the nearest of `known` if it is similar enough, or all."""
  near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
  return f"did you mean {near[0]!r}?" if near else "expected one of " + ", ".join(known)


def require(ok: bool, field: str, value: Any, remedy: str) -> None:
  """Refuses a value unless `ok`. Errors: ConfigError."""
  if not ok:
    raise ConfigError(f"{field} = {value!r}: {remedy}")


def require_once(field: str, keys: Sequence[str]) -> None:
  """Refuses keys that are given twice, of which only one would count. Errors: ConfigError."""
  for place, key in enumerate(keys):
    require(
      key not in keys[:place],
      field,
      key,
      "is given twice, and only one of the two would take effect; give it once",
    )


def require_one_of(section: Any, prefix: str, **allowed: Collection[str]) -> None:
  """Checks fields of a section against their choices. Errors: ConfigError, as all that follow."""
  for name, choices in allowed.items():
    value = getattr(section, name)
    require(
      value in choices, prefix + name, value, "expected one of " + ", ".join(map(repr, choices))
    )


def require_at_least(section: Any, prefix: str, **bounds: float) -> None:
  """Checks that numbers are finite, and at least their bounds."""
  for name, bound in bounds.items():
    value = getattr(section, name)
    require(
      math.isfinite(value) and value >= bound,
      prefix + name,
      value,
      f"expected a finite number of at least {bound}",
    )


def require_fraction(section: Any, prefix: str, *names: str) -> None:
  """Checks that numbers are from 0 to 1, both included."""
  for name in names:
    value = getattr(section, name)
    require(0 <= value <= 1, prefix + name, value, "expected a fraction, 0 to 1")


def check_own_number(field: str, value: Any) -> None:
  """Checks a run's own number against MINIMUM and MAXIMUM."""
  if not isinstance(value, int):
    return
  least, (most, why) = MINIMUM.get(field, value), MAXIMUM.get(field, (value, ""))
  require(value <= most, field, value, f"expected at most {most}, {why}")
  require(value >= least, field, value, f"expected at least {least}")


def unknown_key(path: str, name: str, known: Collection[str]) -> str:
  """The message for a key that a section doesn't have."""
  return f"{path}: unknown key; {nearest(name, sorted(known))}"
