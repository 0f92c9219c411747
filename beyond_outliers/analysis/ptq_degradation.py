"""Degradation by post-training quantization, of every optimizer under every method.

Read from the cells that evaluation jobs write into workdirs."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers import quant
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis.statistics import Comparison, compare_pairs
from beyond_outliers.analysis.tuning import FULL_PRECISION, check_comparable, standing
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.config.files import misfit
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import results, table
from beyond_outliers.mesh import jax_settings
from beyond_outliers.types import Json, PathLike

HIGHER_IS_BETTER = re.compile(r"agreement|/acc|/exact_match|/f1")
# Fields of a cell that describe its run, with their types.
SOURCE = {
  **{
    f"source.config.{name}": kind for name, kind in (("size", str), ("steps", int), ("seed", int))
  },
  **{"source.config.optimizer.name": str, "source.config.optimizer.learning_rate": int | float},
}
ORIGIN = ["run", "size", "steps", "optimizer", "learning_rate", "seed"]
MEASURED_ON = [
  *("version", "data", "tokenizer", "context", "documents", "mask_documents"),
  *("calibration_windows", "average"),
  *jax_settings.DEFAULTS,  # recorded in a cell only if changed
]
# Those that a cell shares with the cell of the model as it was trained.
SAME_TEXT = [name for name in MEASURED_ON if name != "calibration_windows"]
PLACE = "step / steps"  # a cell's position in its run, as named in refusals
FLAGS = ("context", "documents", "average")  # those that evaluate has a flag for
OUTLIERS = "outliers/"  # prefix of outlier metrics, in the cell of the model as it was trained


def degradation_cells(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> pd.DataFrame:
  """One row per cell of each run's last step, with origin, recipe, method and metrics; if no run
  has such cells, of each run's newest step. The newest version of the measurements counts.

  settings: only cells that were measured under these, {"documents": "3"}; cells of averaged
  parameters only if asked for, {"average": "ema"}. folders: where cells of these runs are, besides
  their own eval/. attrs["left_out"]: sentences on what is missing, and other caveats.
  Errors: as `find_cells`."""
  found, said = find_cells(runs, settings, folders)
  cells = cell_table(found)
  cells.attrs["left_out"] = [*without_a_run(runs, folders), *said, *_elsewhere(runs, cells)]
  return cells


def find_cells(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
  but: Collection[str] = (),
) -> tuple[list[tuple[runs_lib.Run, results.Result]], list[str]]:
  """([(run, cell), ...] for `degradation_cells`; sentences on what is left out, and other caveats).

  but: "step", for cells of every step that the newest version measured, and "average", for those of
  averaged parameters too.
  Errors: ConfigError for a folder that does not exist, a setting that no cell has, and runs that
    are not comparable, see `tuning.check_comparable`."""
  for folder in folders:
    remedy = "there is no such folder; give those that evaluate --out wrote to"
    require(os.path.isdir(folder), "folders", str(folder), remedy)
  shared = [cell for folder in folders for cell in results.ResultStore(folder).cells()]
  every = {run: _of_run(run, shared) for run in runs}
  known = set(MEASURED_ON).union(*(cell["settings"] for cells in every.values() for cell in cells))
  for name in settings or {}:
    require(name in known, "--settings", name, f"no cell has it; {nearest(name, sorted(known))}")
  # Cells of averaged parameters only where they are asked for.
  chosen = {**({} if "average" in but else {"average": ""}), **(settings or {})}
  found, said = [], []
  for run, cells in every.items():
    cells = [cell for cell in cells if _is_under(cell, chosen)]
    newest = max((cell["settings"]["version"] for cell in cells), default=0)
    for cell in (cell for cell in cells if cell["settings"]["version"] == newest):
      if fewer := table.of_fewer(cell):
        said.append(f"{run.name}: {fewer}; it is left out")
      else:
        found.append((run, cell))
  if "step" not in but:
    found = _last_steps(found)
    _check_averages(found)
  if having := list(dict.fromkeys(run for run, _ in found)):
    # Optimizers that reached one loss did so in different numbers of steps.
    check_comparable(having, but=("steps",))
  for run, cell in found:
    if others := [fallback["matrix"] for fallback in cell.get("fallbacks", [])]:
      of = f"{cell['recipe']}, {cell['method']}"
      more = f" and {len(others) - 1} more" if len(others) > 1 else ""
      said.append(f"{run.name}: {of} failed on {others[0]}{more}, quantized in another way instead")
  return found, said


def _check_averages(found: Iterable[tuple[runs_lib.Run, results.Result]]) -> None:
  """Refuses averages of the same name that were made differently. Errors: ConfigError."""
  alike: dict[str, tuple[str, Any]] = {}
  for run, cell in found:
    name = cell["settings"].get("average", "")
    over = [step / run.config.steps for step in cell.get("averaged", [])]
    made = {"decay": run.config.average.decay} if name == "ema" else {"steps / all": over}
    first, expected = alike.setdefault(name, (run.name, made))
    if name and made != expected:
      raise ConfigError(f"{name}: {expected} in {first}, {made} in {run.name}: report them apart")


def without_a_run(runs: Sequence[runs_lib.Run], folders: Sequence[PathLike]) -> list[str]:
  """A sentence for each folder that has cells of none of the runs."""
  known = {name for run in runs for name in results.names_of(run)}
  found = []
  for folder in folders:
    trained = [cell["settings"].get("trained") for cell in results.ResultStore(folder).cells()]
    alone = sum(name not in known for name in trained)
    found += [f"{folder}: {alone} of {len(trained)} cells are of none of these runs"] * (alone > 0)
  return found


def cell_table(found: Sequence[tuple[runs_lib.Run, results.Result]]) -> pd.DataFrame:
  """One row per cell: its origin, what it was measured on, step, recipe, method and metrics. A task
  whose name stands for different questions in different cells is named task@HASH.

  Errors: ConfigError for a cell that doesn't describe its run."""
  named: dict[str, set[str]] = {}
  for name, content, _ in (answer for _, cell in found for answer in cell.get("answers", ())):
    named.setdefault(name, set()).add(content)
  unlike = {name for name, contents in named.items() if len(contents) > 1}
  rows = [_row(run.name, cell, unlike) for run, cell in found]
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
  """The command that measures such a cell. settings: those without a flag are ignored."""
  options = {"workdir": run, "steps": step, "recipes": recipe, "methods": method}
  options |= {name: value for name, value in (settings or {}).items() if name in FLAGS}
  words = [f"--{name}={value}" for name, value in options.items() if value != ""]
  words += ["--propagation"] if propagation else []
  return shlex.join(["python", "-m", "beyond_outliers.evaluate", *words])


def beside_full_precision(cells: pd.DataFrame) -> pd.DataFrame:
  """The rows of cells quantized after training, each with values of the same checkpoint in full
  precision: full_precision_loss, relative (loss / full_precision_loss - 1), and its outliers.

  If the cell of the model as it was trained is missing, full_precision_loss follows from
  loss_difference, and there are no outliers."""
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


def compare_optimizers(
  found: pd.DataFrame, metric: str = "loss_difference"
) -> list[tuple[str, str, Comparison]]:
  """(recipe, method, whether seeds tell two optimizers apart), for each recipe and method after
  Holm's correction over its pairs, the surest first.

  found: cells that `check_cells` accepts. Values that are not finite are left out."""
  measured = found[(found.method != "none") & np.isfinite(found[metric].astype(float))]
  compared = []
  for (recipe, method), cells in measured.groupby(["recipe", "method"]):
    paid = {str(name): of.set_index("seed")[metric] for name, of in cells.groupby("optimizer")}
    pairs = compare_pairs({name: of.to_dict() for name, of in paid.items()})
    compared += [(recipe, method, one) for one in pairs]
  return compared


def check_cells(measured: pd.DataFrame, but: Collection[str] = ()) -> None:
  """Refuses cells whose means or differences would be meaningless.

  but: what cells of one optimizer may differ in.
  Errors: ConfigError for an optimizer with cells of several learning rates, lengths or steps, or
    two of one seed; and for cells that differ in the point of their run or what they measured."""
  # Calibration windows are compared within a method, since methods without calibration have none.
  for key, within in {
    **dict.fromkeys((*MEASURED_ON, PLACE)),
    **dict.fromkeys(("learning_rate", "steps", "step"), "optimizer"),
    "calibration_windows": "method",
  }.items():
    if key in but or (key == PLACE and "step" in but):
      continue
    cells = measured.assign(**{PLACE: measured.step / measured.steps})
    for name, rows in cells.groupby(within) if within else [("all", cells)]:
      values = sorted(rows[key].unique().tolist(), key=lambda value: (value != "", value))
      if len(values) > 1:
        choice = f"choose by --settings={key}={values[0]}"
        remedy = choice if key in MEASURED_ON else "measure cells of one value"
        raise ConfigError(f"{name}: the cells have {key} = {values}; give runs of one, or {remedy}")
  for (optimizer, seed, recipe, method, *_), rows in measured.groupby(
    ["optimizer", "seed", "recipe", "method", *but]
  ):
    if len(rows) > 1:
      raise ConfigError(
        f"{optimizer}: {' and '.join(map(str, rows.run))} have seed {seed} and a cell of {recipe} "
        f"and {method}; give one of them, or choose by --settings"
      )


def _last_steps(
  found: Sequence[tuple[runs_lib.Run, results.Result]],
) -> list[tuple[runs_lib.Run, results.Result]]:
  """The cells of runs' last steps; if there are none, those of the newest step of each run."""
  newest: dict[runs_lib.Run, int] = {}
  for run, cell in found:
    newest[run] = max(cell["step"], newest.get(run, 0))
  last = [(run, cell) for run, cell in found if cell["step"] == run.config.steps]
  return last or [(run, cell) for run, cell in found if cell["step"] == newest[run]]


def _elsewhere(runs: Sequence[runs_lib.Run], cells: pd.DataFrame) -> list[str]:
  """Sentences on full-precision runs that are not done, or have no cells of their last step."""
  at = dict(zip(cells.run, cells.step, strict=True))
  return [
    standing(run)
    + (f", its cells are of step {at[run.name]}" if run.name in at else ", no cell of it counts")
    for run in runs
    if quant.recipes.name_of(run.config.quant) == FULL_PRECISION
    and (run.status["status"] != "done" or at.get(run.name) != run.config.steps)
  ]


def _of_run(run: runs_lib.Run, shared: Sequence[results.Result]) -> list[results.Result]:
  every = [*shared, *results.ResultStore(run.path / "eval").cells()]
  # A cell that is in several folders counts once, by its file's name.
  identity = ("step", "recipe", "method", "settings")
  by_name = {
    results.file_name(*(cell[of] for of in identity)): cell for cell in results.of_run(run, every)
  }
  return list(by_name.values())


def _is_under(cell: Json, settings: Mapping[str, str]) -> bool:
  return all(str(cell["settings"].get(name, "")) == str(value) for name, value in settings.items())


def _row(run: str, cell: Json, unlike: Collection[str]) -> Json:
  """A row of `cell_table`. unlike: tasks whose questions differ between cells.

  Errors: ConfigError for a cell that doesn't describe its run."""
  if problem := misfit(cell, SOURCE):
    which = f"step {cell['step']}, {cell['recipe']}, {cell['method']}"
    raise ConfigError(f"{run}: the cell of {which} {problem}; remove it and evaluate it again")
  c = cell["source"]["config"]
  optimizer = c["optimizer"]
  values = run, c["size"], c["steps"], optimizer["name"], optimizer["learning_rate"], c["seed"]
  scores = {
    f"{name}@{content[:8] or 'unknown'}/{score}" if name in unlike else f"{name}/{score}": value
    for name, content, metrics in cell.get("answers", ())
    for score, value in metrics.items()
  }
  numbers = {**cell["metrics"], **scores}
  measured = {name: math.inf if value is None else value for name, value in numbers.items()}
  return {
    **dict(zip(ORIGIN, values, strict=True)),
    **{name: cell[name] for name in ("step", "recipe", "method", "size_bytes")},
    **measured,
    **{name: cell["settings"].get(name, "") for name in MEASURED_ON},
  }
