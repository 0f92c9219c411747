"""Sections of the report: sentences, figures and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from beyond_outliers.analysis.plots.style import named_rows
from beyond_outliers.types import PathLike


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A figure: name of its file, caption, and a function that draws it into an SVG file."""

  name: str
  caption: str
  draw: Callable[[PathLike], Any]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table: name of its file and caption; columns of text for the page, and numbers for the file.

  columns: heading -> function of an item; text between ** is bold. numbers: contents of the CSV
  file."""

  name: str
  caption: str
  columns: Mapping[str, Callable[[Any], str]]
  items: Sequence[Any]
  numbers: pd.DataFrame

  def rows(self) -> list[list[str]]:
    return [[text(item) for text in self.columns.values()] for item in self.items]


@dataclasses.dataclass(frozen=True)
class Part:
  """The answer of a group of runs, or of all, to a section's question.

  missing: one line on what is missing, if there is no answer; command: what makes that, or prints
  the same numbers. runs: how many it is from. left_out: sentences."""

  heading: str = ""
  runs: int = 0
  sentences: Sequence[str] = ()
  figures: Sequence[Drawing] = ()
  tables: Sequence[Table] = ()
  command: str = ""
  missing: str = ""
  left_out: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class PageSection:
  """A question and its parts, one per group of runs."""

  key: str  # its address in the page
  title: str
  question: str
  parts: Sequence[Part]

  @property
  def empty(self) -> bool:
    return all(part.missing for part in self.parts)


def frame_table(
  name: str, caption: str, frame: pd.DataFrame, shown: Mapping[str, Callable[[Any], str]]
) -> Table:
  """A table whose items are the rows of a frame."""
  return Table(name, caption, shown, named_rows(frame), frame)


def comparison_numbers(names: Sequence[str], compared: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
  """Contents of a CSV file of comparisons, from rows that end with a `Comparison`.

  names: of the columns before it, of the comparison's name, and of its value."""
  return pd.DataFrame(
    [
      (*keys, one.name, one.value, *one.interval, one.p, one.n, not one.tie)
      for *keys, one in compared
    ],
    columns=[*names, "low", "high", "p", "seeds", "told apart"],
  )


def unique(lines: Iterable[str]) -> list[str]:
  return list(dict.fromkeys(lines))
