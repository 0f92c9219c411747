"""Words and numbers of the report, as text."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from beyond_outliers import stores
from beyond_outliers.analysis.statistics import Estimate
from beyond_outliers.analysis.tables import plus_minus

MANY = 12  # numbers listed in one cell of a table, at most
NOTHING = "–"  # where there is no number

EVALUATE = "python -m beyond_outliers.evaluate --workdir=RUN --recipes=rtn_w4a4"


def analysis_command(roots: Sequence[str], *more: str) -> str:
  """The command for another report on the same runs."""
  flags = [shlex.quote(flag) for flag in (f"--root={','.join(roots)}", *more)]
  return " ".join(["python -m beyond_outliers.analysis", *flags])


def own_roots(roots: Sequence[str], own: Sequence[str], every: Sequence[str]) -> list[str]:
  """The highest folders, at or below those that runs were found in, that hold some of these runs
  and none of the others. own, every: names of these runs, and of all."""
  others = [f"{name}/" for name in every if name not in own]

  def highest(name: str) -> str:
    for root in roots:
      place = root if stores.is_address(root) else os.path.abspath(os.path.expanduser(root))
      place = place.rstrip("/")
      if not f"{name}/".startswith(f"{place}/"):
        continue
      parts = name[len(place) :].strip("/").split("/")
      for depth in range(len(parts) + 1):
        below = "".join(f"/{part}" for part in parts[:depth])
        if not any(other.startswith(f"{place}{below}/") for other in others):
          return f"{root.rstrip('/')}{below}" or root
    return name

  return list(dict.fromkeys(map(highest, own)))


def number(value: Any, style: str = ".4f") -> str:
  """A number as text; NOTHING for what is not a number, words for one that is not finite."""
  found = pd.to_numeric(value, errors="coerce")
  if found is None or math.isnan(found):
    return NOTHING
  if not math.isfinite(found):
    return "not finite"
  return f"{found:{'.3g' if style.endswith('f') and abs(found) >= 1e6 else style}}"


def with_error(mean: Any, stderr: Any, digits: int = 4, sign: str = "") -> str:
  """mean ± standard error, where there is one."""
  if mean is None or math.isnan(mean):
    return NOTHING
  if not math.isfinite(mean):
    return "not finite"
  return plus_minus(Estimate(float(mean), float(stderr)), digits, sign)


def rates(values: Iterable[float]) -> str:
  """Learning rates as text: each of them, or their range and number if there are MANY."""
  found = sorted(set(values))
  if len(found) > MANY:
    return f"{found[0]:g} to {found[-1]:g}, {len(found)} rates"
  return ", ".join(f"{value:g}" for value in found)


def listed(names: Iterable[Any]) -> str:
  """a, b and c"""
  *before, last = [str(name) for name in names] or [""]
  return f"{', '.join(before)} and {last}" if before else last


def extremes(values: Mapping[str, float], unit: str) -> str:
  """The least and the greatest of several optimizers' means, in words."""
  finite = {name: value for name, value in values.items() if math.isfinite(value)}
  if not finite:
    return ""
  least, most = (extreme(finite, key=finite.__getitem__) for extreme in (min, max))
  if least == most:
    return f"{finite[least]:+.4f} {unit} ({least})"
  return f"from {finite[least]:+.4f} ({least}) to {finite[most]:+.4f} {unit} ({most})"


def field(row: Any, name: str) -> str:
  """A row's value, unformatted."""
  return str(getattr(row, name))


def text_columns(
  frame: pd.DataFrame, styles: Mapping[str, str | None]
) -> Mapping[str, Callable[[Any], str]]:
  """Columns of a table whose items are rows of a frame: {column: format of its numbers, None for
  text}."""

  def column(name: str, style: str | None) -> Callable[[Any], str]:
    at = frame.columns.get_loc(name)
    return lambda row: str(row[at]) if style is None else number(row[at], style)

  return {name: column(name, style) for name, style in styles.items() if name in frame}
