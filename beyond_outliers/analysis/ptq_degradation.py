"""Degradation by post-training quantization, of every optimizer under every method.

Read from the cells that evaluation jobs leave in workdirs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

import pandas as pd

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import tables
from beyond_outliers.analysis.statistics import Estimate
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.config.files import misfit
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import results
from beyond_outliers.types import Json, PathLike

HIGHER_IS_BETTER = re.compile(r"agreement|/acc|/exact_match|/f1")
# Of a cell's run, as the cell has them.
SOURCE = {
  **{
    f"source.config.{name}": kind for name, kind in (("size", str), ("steps", int), ("seed", int))
  },
  **{"source.config.optimizer.name": str, "source.config.optimizer.learning_rate": int | float},
}
ORIGIN = ["run", "size", "steps", "optimizer", "learning_rate", "seed"]
MEASURED_ON = [
  "version",
  "data",
  "tokenizer",
  "context",
  "documents",
  "mask_documents",
  "calibration_windows",
]


def degradation_cells(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> pd.DataFrame:
  """One row per cell of the last step that each run was evaluated at, by the newest version that
  did: where it comes from, recipe, method and its metrics.

  settings: only cells that were measured under these, {"documents": "3"}. folders: where cells of
  these runs are beside their own eval/."""
  shared = [cell for folder in folders for cell in results.ResultStore(folder).cells()]
  rows = [row for run in runs for row in _of_run(run, settings or {}, shared)]
  return pd.DataFrame(
    rows, columns=None if rows else [*ORIGIN, *MEASURED_ON, "step", "recipe", "method"]
  )


def degradation_table(found: pd.DataFrame, metric: str = "loss_difference", digits: int = 4) -> str:
  """Markdown: one row per (recipe, method), one column per optimizer; means over seeds ± their
  standard error, the best of each recipe and optimizer in bold. Rows in order of the mean over all
  optimizers, best first. loss_difference: nats, to full precision on the same tokens.

  A metric that is not finite counts as infinite. Runs that were trained quantized are left out.
  Errors: ConfigError for a metric that no cell has; when an optimizer has runs of several learning
  rates or lengths, or two of one seed; or cells differ in the model's size or in what they were
  measured on: their means would say nothing."""
  measured = found[found.method != "none"].dropna(axis="columns", how="all")
  _check_metric(metric, measured)
  measured = measured[measured[metric].notna()]
  _check_comparable(measured)
  means = measured.groupby(["recipe", "method", "optimizer"])[metric].agg(["mean", "sem"])
  estimates = {cell: Estimate(*values) for cell, *values in means.itertuples(name=None)}
  sign = -1 if HIGHER_IS_BETTER.search(metric) else 1
  best = (sign * means["mean"]).groupby(["recipe", "optimizer"]).min() * sign
  order = means["mean"].groupby(["recipe", "method"]).mean()

  def cell_text(row: tuple[str, str], optimizer: str) -> str:
    recipe, method = row
    value = estimates.get((recipe, method, optimizer))
    if value is None:
      return ""
    text = tables.plus_minus(value, digits, "+" if "difference" in metric else "")
    return f"**{text}**" if value.mean == best[recipe, optimizer] else text

  return tables.markdown_table(
    {
      "recipe": lambda row: row[0],
      "method": lambda row: row[1],
      **{
        optimizer: functools.partial(cell_text, optimizer=optimizer)
        for optimizer in sorted(set(measured.optimizer))
      },
    },
    sorted(order.index, key=lambda row: (row[0], sign * order[row])),
  )


def _check_metric(metric: str, measured: pd.DataFrame) -> None:
  known = [
    str(name)
    for name in measured.select_dtypes("number")
    if name not in (*ORIGIN, *MEASURED_ON, "step")
  ]
  require(
    bool(known),
    "--degradation",
    metric,
    "these runs have no cell of a recipe; measure some: "
    "python -m beyond_outliers.evaluate --workdir=RUN --recipes=rtn_w4a4",
  )
  require(metric in known, "--degradation", metric, f"no cell has it; {nearest(metric, known)}")


def _check_comparable(measured: pd.DataFrame) -> None:
  # Optimizers that came to one loss did so in lengths of their own. Methods that look at no data
  # have no windows.
  for key, within in {
    **dict.fromkeys(("size", *MEASURED_ON)),
    **dict.fromkeys(("learning_rate", "steps", "step"), "optimizer"),
    "calibration_windows": "method",
  }.items():
    for name, rows in measured.groupby(within) if within else [("all", measured)]:
      values = rows[key].unique()
      if len(values) > 1:
        remedy = (
          f"or choose by --settings={key}={values[0]}"
          if key in MEASURED_ON
          else "or make the cells, of one"
        )
        raise ConfigError(
          f"{name}: the cells have {key} = {sorted(values)}; give the runs, {remedy}"
        )
  for (optimizer, seed, recipe, method), rows in measured.groupby(
    ["optimizer", "seed", "recipe", "method"]
  ):
    if len(rows) > 1:
      raise ConfigError(
        f"{optimizer}: {' and '.join(map(str, rows.run))} have seed {seed} and a cell of {recipe} "
        f"and {method}; give one of them, or choose by --settings"
      )


def _of_run(
  run: runs_lib.Run, settings: Mapping[str, str], shared: Sequence[results.Result]
) -> list[Json]:
  # Earlier versions told trainings apart by their time.
  itself = (run.identity, run.manifest["time"])
  found = [
    cell
    for cell in [*results.ResultStore(run.path / "eval").cells(), *shared]
    if cell["settings"].get("trained") in itself
    # Cells of averaged parameters only where they are asked for.
    and cell["settings"].get("average", "") == settings.get("average", "")
    and all(str(cell["settings"].get(name)) == value for name, value in settings.items())
  ]
  newest = max(map(_age, found), default=None)
  return [_row(str(run.path), cell) for cell in found if _age(cell) == newest]


def _age(cell: Json) -> tuple[int, int]:
  return cell["settings"]["version"], cell["step"]


def _row(run: str, cell: Json) -> Json:
  """Errors: ConfigError for a cell that doesn't say what it was measured of."""
  if problem := misfit(cell, SOURCE):
    which = f"step {cell['step']}, {cell['recipe']}, {cell['method']}"
    raise ConfigError(f"{run}: the cell of {which} {problem}; remove it and evaluate it again")
  c = cell["source"]["config"]
  optimizer = c["optimizer"]
  values = run, c["size"], c["steps"], optimizer["name"], optimizer["learning_rate"], c["seed"]
  numbers = {**cell["metrics"], **results.task_scores(cell)}
  measured = {name: math.inf if value is None else value for name, value in numbers.items()}
  return {
    **dict(zip(ORIGIN, values, strict=True)),
    **{name: cell[name] for name in ("step", "recipe", "method", "size_bytes")},
    **measured,
    **{name: cell["settings"].get(name, "") for name in MEASURED_ON},
  }
