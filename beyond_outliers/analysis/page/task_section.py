"""Section on tasks: models' scores, as trained and quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pandas as pd

from beyond_outliers.analysis.page.evidence import Evidence, RunGroup, attempt
from beyond_outliers.analysis.page.section import Part, Table
from beyond_outliers.analysis.page.text import EVALUATE, NOTHING, with_error
from beyond_outliers.analysis.plots import style
from beyond_outliers.analysis.ptq_degradation import MEASURED_ON, check_cells
from beyond_outliers.evaluate.plan import PROPAGATION

KEYS = ["recipe", "method", "score"]  # that identify a row
STDERR = "_stderr"  # suffix of the scores' standard errors, which are over examples
# Settings of a cell that its tasks do not depend on: scores compare even if these differ.
OF_TEXT = ("data", "documents", "mask_documents")


def scored_tasks(evidence: Evidence, group: RunGroup) -> Part:
  """Scores of every task by recipe, method and optimizer."""
  del evidence
  cells = group.measured.value
  judged = attempt(lambda: _scores(cells), pd.DataFrame())
  found = judged.value
  if not len(found):
    why = group.measured.problem or judged.problem or "no task was evaluated"
    return Part(group.title, len(group.runs), missing=why, command=f"{EVALUATE} --tasks=last_word")
  caption = (
    "Means over seeds ± standard errors; of one seed ± the error over examples. none: as trained. "
    "A guess is right in 0.5 of questions with two choices, and 0.25 of those with four."
  )
  unlike = found["score"].str.contains("@").any()
  return Part(
    group.title,
    found["run"].nunique(),
    ["task@HASH: different questions under one name, kept apart by their hash."] if unlike else [],
    tables=[_by_optimizer(f"tasks.{group.name}", caption, found)],
    command=f"{EVALUATE} --tasks=study --task_folders=tasks",
    left_out=cells.attrs.get("left_out", []),
  )


def _scores(cells: pd.DataFrame) -> pd.DataFrame:
  """One row per score of a model: recipe, method, score, optimizer, seed, run, value, stderr.

  Errors: ConfigError as `ptq_degradation.check_cells`."""
  names = [name for name in map(str, cells) if "/" in name and f"{name}{STDERR}" in cells]
  parts = [
    cells.assign(score=name, value=cells[name], stderr=cells[f"{name}{STDERR}"])
    for name in names
    if name.split("/")[0] != PROPAGATION
  ]
  kept = [*KEYS, "optimizer", "seed", "run", "value", "stderr"]
  if not parts:
    return pd.DataFrame(columns=kept)
  found = pd.concat(parts).dropna(subset="value").assign(**dict.fromkeys(OF_TEXT, ""))
  found = found.drop_duplicates([*KEYS, "run", "step", *MEASURED_ON])
  for _, scores in found.groupby("score"):
    check_cells(scores)
  return found[kept]


def _by_optimizer(name: str, caption: str, found: pd.DataFrame) -> Table:
  """One row per recipe, method and score, one column per optimizer."""
  means = {tuple(row[:4]): row for row in style.named_rows(_means(found))}
  rows = found[KEYS].drop_duplicates().itertuples(index=False, name=None)

  def text(row: tuple[str, str, str], optimizer: str) -> str:
    cell = means.get((*row, optimizer))
    if cell is None:
      return NOTHING
    return with_error(cell.mean, cell.error, 0 if cell.mean >= 1000 else 4)

  columns: dict[str, Callable[[Any], str]] = {
    "recipe": lambda row: row[0],
    "method": lambda row: row[1],
    "score": lambda row: row[2],
    **{
      optimizer: functools.partial(text, optimizer=optimizer)
      for optimizer in style.in_order(found["optimizer"])
    },
  }
  return Table(name, caption, columns, sorted(rows, key=_order), found)


def _means(found: pd.DataFrame) -> pd.DataFrame:
  """KEYS, optimizer, mean, error: the standard error over seeds, or for one seed over examples."""
  by = [*KEYS, "optimizer"]
  means = style.over_seeds(found, by, "value").merge(found.drop_duplicates(by)[[*by, "stderr"]])
  return means.assign(error=means["sem"].fillna(means["stderr"]))


def _order(row: tuple[str, str, str]) -> tuple[bool, str, str, str]:
  """Sort key: the models as they were trained first, then by task."""
  return row[0] != "none", row[2].split("/")[0], *row[:2]
