"""Degradation by post-training quantization, of every optimizer under every method.

Read from the cells that evaluation jobs leave in workdirs."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import tables
from beyond_outliers.analysis.statistics import Comparison, Estimate, compare_pairs
from beyond_outliers.analysis.tuning import FULL_PRECISION
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
  "average",
]
# Of those, what a cell has in common with that of the model as it was trained.
SAME_TEXT = [name for name in MEASURED_ON if name != "calibration_windows"]
FLAGS = ("context", "documents", "average")  # of those, what evaluate has a flag for
OUTLIERS = "outliers/"  # how their metrics begin, in the cell of the model as it was trained


def degradation_cells(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> pd.DataFrame:
  """One row per cell of the last step that each run was evaluated at, by the newest version that
  did: where it comes from, recipe, method and its metrics.

  settings: only cells that were measured under these, {"documents": "3"}; of averaged parameters
  those alone, and only, that {"average": "ema"} asks for. folders: where cells of these runs are
  beside their own eval/."""
  return cell_table(find_cells(runs, settings, folders))


def find_cells(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
  but: Collection[str] = (),
) -> list[tuple[runs_lib.Run, results.Result]]:
  """(run, cell) of the cells that `degradation_cells` takes.

  but: "step", for those of every step that the newest version of the measurements was at, and
  "average", for those of averaged parameters too.
  Errors: ConfigError for a folder that is none."""
  for folder in folders:
    require(
      os.path.isdir(folder),
      "folders",
      str(folder),
      "there is no such folder; give those that evaluate had as --out",
    )
  shared = [cell for folder in folders for cell in results.ResultStore(folder).cells()]
  # Cells of averaged parameters only where they are asked for.
  chosen = {**({} if "average" in but else {"average": ""}), **(settings or {})}
  found = []
  for run in runs:
    cells = _of_run(run, chosen, shared)
    newest = max(map(_age, cells), default=(0, 0))
    found += [
      (run, cell)
      for cell in cells
      if _age(cell) == newest or ("step" in but and _age(cell)[0] == newest[0])
    ]
  return found


def without_a_run(runs: Sequence[runs_lib.Run], folders: Sequence[PathLike]) -> list[str]:
  """In words how many cells of each folder are of none of the runs, where there are any."""
  known = {name for run in runs for name in results.names_of(run)}
  found = []
  for folder in folders:
    trained = [cell["settings"].get("trained") for cell in results.ResultStore(folder).cells()]
    alone = sum(name not in known for name in trained)
    found += [f"{folder}: {alone} of {len(trained)} cells are of none of these runs"] * (alone > 0)
  return found


def cell_table(found: Sequence[tuple[runs_lib.Run, results.Result]]) -> pd.DataFrame:
  """One row per cell: where it comes from, what it was measured on, step, recipe, method and its
  metrics. Errors: ConfigError for a cell that doesn't say what it was measured of."""
  rows = [_row(run.name, cell) for run, cell in found]
  return pd.DataFrame(
    rows, columns=None if rows else [*ORIGIN, *MEASURED_ON, "step", "recipe", "method"]
  )


def evaluation_command(
  run: PathLike = "RUN",
  recipe: str = "rtn_w4a4",
  method: str = "",
  *,
  step: int | str = "",
  propagation: bool = False,
  settings: Mapping[str, object] | None = None,
) -> str:
  """The command that makes such a cell. settings: those that have a flag of their name count."""
  options = {"workdir": run, "steps": step, "recipes": recipe, "methods": method}
  options |= {name: value for name, value in (settings or {}).items() if name in FLAGS}
  words = [f"--{name}={value}" for name, value in options.items() if value != ""]
  words += ["--propagation"] if propagation else []
  return shlex.join(["python", "-m", "beyond_outliers.evaluate", *words])


def beside_full_precision(cells: pd.DataFrame) -> pd.DataFrame:
  """The rows of cells quantized after training, each with what the same checkpoint has in full
  precision: full_precision_loss, relative (loss / full_precision_loss - 1), and its outliers.

  Where the cell of the model as it was trained is missing, the loss in full precision is that of
  the difference, and there are no outliers."""
  keys = ["run", "step", *SAME_TEXT]
  quantized = cells[cells.method != "none"].dropna(axis="columns", how="all")
  trained = cells[(cells.method == "none") & (cells.recipe == FULL_PRECISION)]
  outliers = [name for name in map(str, cells) if name.startswith(OUTLIERS)]
  joined = quantized.merge(
    trained.reindex(columns=[*keys, "loss", *outliers])
    .rename(columns={"loss": "full_precision_loss"})
    .drop_duplicates(keys),
    how="left",
    on=keys,
  )
  if "loss_difference" in joined:
    finite = np.isfinite(joined.loss_difference.astype(float))
    paired = (joined.loss - joined.loss_difference).where(finite)
    joined["full_precision_loss"] = joined.full_precision_loss.fillna(paired)
  return joined.assign(relative=joined.loss / joined.full_precision_loss - 1)


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
  check_cells(measured)
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


def compare_optimizers(
  found: pd.DataFrame, metric: str = "loss_difference"
) -> list[tuple[str, str, Comparison]]:
  """(recipe, method, whether seeds tell two optimizers apart), of each recipe and method after
  Holm's correction over its pairs, the surest first.

  found: cells that `check_cells` accepts. A metric that is not finite is no value."""
  measured = found[(found.method != "none") & np.isfinite(found[metric].astype(float))]
  compared = []
  for (recipe, method), cells in measured.groupby(["recipe", "method"]):
    paid = {str(name): of.set_index("seed")[metric] for name, of in cells.groupby("optimizer")}
    pairs = compare_pairs({name: of.to_dict() for name, of in paid.items()})
    compared += [(recipe, method, one) for one in pairs]
  return compared


def _check_metric(metric: str, measured: pd.DataFrame) -> None:
  others = (*ORIGIN, *MEASURED_ON, "step")
  known = [str(name) for name in measured.select_dtypes("number") if name not in others]
  remedy = f"these runs have no cell of a recipe; measure some: {evaluation_command()}"
  require(bool(known), "--degradation", metric, remedy)
  require(metric in known, "--degradation", metric, f"no cell has it; {nearest(metric, known)}")


def check_cells(measured: pd.DataFrame, but: Collection[str] = ()) -> None:
  """Refusal of cells whose means, or differences, would say nothing.

  but: what cells of one optimizer may differ in.
  Errors: ConfigError for optimizers that have cells of several learning rates, lengths or steps, or
    two of one seed; and cells that differ in the model's size or in what they were measured on."""
  # Optimizers that came to one loss did so in lengths of their own. Methods that look at no data
  # have no windows.
  for key, within in {
    **dict.fromkeys(("size", *MEASURED_ON)),
    **dict.fromkeys(("learning_rate", "steps", "step"), "optimizer"),
    "calibration_windows": "method",
  }.items():
    if key in but:
      continue
    for name, rows in measured.groupby(within) if within else [("all", measured)]:
      values = rows[key].unique().tolist()
      if len(values) > 1:
        choice = f"choose by --settings={key}={values[0]}"
        remedy = f"or {choice if key in MEASURED_ON else 'make the cells, of one'}"
        raise ConfigError(
          f"{name}: the cells have {key} = {sorted(values)}; give the runs, {remedy}"
        )
  for (optimizer, seed, recipe, method, *_), rows in measured.groupby(
    ["optimizer", "seed", "recipe", "method", *but]
  ):
    if len(rows) > 1:
      raise ConfigError(
        f"{optimizer}: {' and '.join(map(str, rows.run))} have seed {seed} and a cell of {recipe} "
        f"and {method}; give one of them, or choose by --settings"
      )


def _of_run(
  run: runs_lib.Run, settings: Mapping[str, str], shared: Sequence[results.Result]
) -> list[results.Result]:
  found = [
    cell
    for cell in results.of_run(run, [*shared, *results.ResultStore(run.path / "eval").cells()])
    if all(str(cell["settings"].get(name, "")) == str(value) for name, value in settings.items())
  ]
  # One that lies in several folders is one, as its name says.
  identity = ("step", "recipe", "method", "settings")
  by_name = {results.file_name(*(cell[of] for of in identity)): cell for cell in found}
  return list(by_name.values())


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
