"""Predictors of what quantization after training costs: outliers, and the error at the network's
end, next to what was lost (arXiv 2509.23500, sections 4 and 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers import quant
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import ptq_degradation
from beyond_outliers.analysis.correlations import CORRELATIONS, correlation
from beyond_outliers.analysis.statistics import check_confidence
from beyond_outliers.analysis.tuning import FULL_PRECISION
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import results
from beyond_outliers.evaluate.outlier_metrics import METRICS
from beyond_outliers.types import PathLike

KEYS = ("optimizer", "seed", "run", "recipe", "method", "step", "learning_rate", "average")
ERRORS = ("R_L", "R_L_centred", "R_L_logits", "inherited")
GIVEN = "full_precision_loss"
# Prefixes of columns in a table of cells, removed here.
PREFIXES = (ptq_degradation.OUTLIERS, "propagation/")
# Prefix of columns of `correlations` -> the coefficients at that level.
LEVELS = {
  "": tuple(CORRELATIONS),  # over optimizers, means over their seeds
  "runs_": tuple(CORRELATIONS),  # over all runs, with each optimizer's as a cluster
  "partial_": ("pearson", "spearman"),  # over optimizers, given the loss in full precision
}
LIMITS = ("", "_low", "_high", "_p")  # suffixes: the value, the ends of its interval, and p


def frame(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
  *,
  but: Collection[str] = (),
) -> pd.DataFrame:
  """One row per cell quantized after training, at its run's last step.

  Columns: KEYS; what was lost: loss_difference (nats), kl, agreement, scores of tasks, relative
  (loss / full_precision_loss - 1); full_precision_loss; then the predictors: outliers of the
  full-precision checkpoint, named as in its cell without `outliers/` (`max_to_median/linear`, the
  MMR of linear layers' inputs; also `residual`, `activation` and `weights`), and from the cell's
  own error R_L at the final norm, R_L_centred, R_L_logits, and inherited, which `evaluate
  --propagation` measures.
  attrs["left_out"]: sentences on the full-precision runs without such a cell; cells of other steps
  don't count, since they are at other points of the schedule.
  settings, folders: see `ptq_degradation.degradation_cells`. but: what runs of one optimizer may
  differ in: ("learning_rate",) for whole sweeps.
  Errors: ConfigError if no run has such a cell, and as `ptq_degradation.check_cells`."""
  found, said = _at_the_end(runs, settings, folders)
  cells = ptq_degradation.cell_table(found)
  left_out = [*said, *_check_any(runs, cells[cells.method != "none"], settings)]
  joined = ptq_degradation.beside_full_precision(cells)
  ptq_degradation.check_cells(joined, but)
  for prefix in PREFIXES:
    joined = joined.rename(columns=lambda name, prefix=prefix: name.removeprefix(prefix))
  names = list(map(str, joined))
  errors = [name for name in names if name.removesuffix("_stderr") in ERRORS]
  behind = [GIVEN, *filter(_is_outlier_metric, names), *errors]
  of_cells = {*ptq_degradation.ORIGIN, *ptq_degradation.MEASURED_ON, *KEYS, *behind, "size_bytes"}
  lost = [name for name in names if name not in of_cells and not name.endswith("_interval")]
  table = joined[[*KEYS, *lost, *behind]].sort_values(list(KEYS)).reset_index(drop=True)
  table.attrs["left_out"] = left_out
  return table


def units(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> pd.DataFrame:
  """One row per unit of every cell whose error was decomposed: KEYS, and the columns of
  `propagation.decompose`: name, kind, R, A, B, C, gain, ..., in execution order.

  Cells, settings, folders and errors: as `frame`."""
  found, said = _at_the_end(runs, settings, folders)
  decomposed = [(run, cell) for run, cell in found if cell.get("units")]
  cells = ptq_degradation.cell_table(decomposed)
  left_out = [*said, *_check_any(runs, cells, settings)]
  for _, alike in cells.groupby(cells.method == "none"):  # trained quantized, or quantized after
    ptq_degradation.check_cells(alike)
  of_cells = zip(cells[list(KEYS)].to_dict("records"), decomposed, strict=True)
  table = pd.DataFrame([{**keys, **unit} for keys, (_, cell) in of_cells for unit in cell["units"]])
  numbers = table.columns.difference(["name", "kind", *KEYS], sort=False)
  table = table.astype(dict.fromkeys(numbers, float))  # null, as gains without an error, to NaN
  table.attrs["left_out"] = left_out
  return table


def correlations(
  frame: pd.DataFrame,
  lost: str = "loss_difference",
  *,
  predictors: Sequence[str] | None = None,
  confidence: float = 0.95,
) -> pd.DataFrame:
  """Correlations of what was lost with each predictor, from a table of `frame`: one row per
  (recipe, method, predictor).

  Columns, by LEVELS: pearson, spearman and kendall over `optimizers`, means over their seeds; with
  `runs_` over all `runs`, if an optimizer has several; with `partial_` given the loss in full
  precision. Each has `_low` and `_high`, the bootstrap interval, and `_p`; see
  `correlations.correlation`. reason: why something is NaN, or which runs do not count. p is not
  corrected for several predictors: of twenty that predict nothing, one is below .05 on average. A
  row takes half a second.
  predictors: by default all outlier metrics of the table, and ERRORS.
  Errors: ConfigError if the table has no column `lost`."""
  known = [name for name in map(str, frame.select_dtypes("number")) if name not in KEYS]
  require(lost in known, "lost", lost, nearest(lost, known))
  check_confidence(confidence)
  outliers = filter(_is_outlier_metric, map(str, frame))
  predictors = [*outliers, *ERRORS] if predictors is None else predictors
  rows = [
    {"recipe": recipe, "method": method, "predictor": name}
    | _correlated(cells, name, lost, confidence)
    for (recipe, method), cells in frame.groupby(["recipe", "method"])
    for name in predictors
  ]
  return pd.DataFrame(rows)


def _is_outlier_metric(name: str) -> bool:
  return name.partition("/")[0] in METRICS


def _at_the_end(
  runs: Sequence[runs_lib.Run], settings: Mapping[str, str] | None, folders: Sequence[PathLike]
) -> tuple[list[tuple[runs_lib.Run, results.Result]], list[str]]:
  """`ptq_degradation.find_cells`, for each run's last step only."""
  found, said = ptq_degradation.find_cells(runs, settings, folders)
  return [(run, cell) for run, cell in found if cell["step"] == run.config.steps], said


def _check_any(
  runs: Sequence[runs_lib.Run], cells: pd.DataFrame, settings: Mapping[str, str] | None
) -> list[str]:
  """Sentences on the full-precision runs without any of these cells. Errors: ConfigError if there
  are no cells."""
  having = set(cells.run)
  without = [
    run
    for run in runs
    if run.name not in having and quant.recipes.name_of(run.config.quant) == FULL_PRECISION
  ]
  if cells.empty:
    under = f" under the settings {dict(settings)}" if settings else ""
    command = ptq_degradation.evaluation_command(
      without[0].path if without else "RUN", propagation=True, settings=settings
    )
    raise ConfigError(
      f"runs: none of {len(runs)} has a quantized cell of its last step with what this needs"
      f"{under}; measure some: {command}"
    )
  return [
    f"{run.name}: none of the cells of its last step, {run.config.steps}, has what this needs"
    for run in without
  ]


def _correlated(cells: pd.DataFrame, name: str, lost: str, confidence: float) -> dict[str, Any]:
  """The columns of one row of `correlations`, after its keys."""
  row: dict[str, Any] = {"optimizers": 0, "runs": 0}
  row |= {
    f"{level}{method}{part}": np.nan
    for level, methods in LEVELS.items()
    for method in methods
    for part in LIMITS
  }
  if name not in cells or cells[name].isna().all():
    return row | {"reason": f"no cell has {name}"}
  counts = cells[[name, lost]].notna().all(axis=1)
  without = cells[~counts]
  reasons = [
    f"without {optimizer}, seed {seed}, which lacks it"
    for optimizer, seed in zip(without.optimizer, without.seed, strict=True)
  ]
  cells = cells[counts].sort_values(["optimizer", "seed"])
  means = cells.groupby("optimizer")[[name, lost, GIVEN]].mean().reset_index()
  row |= {"optimizers": len(means), "runs": len(cells)}
  for level, methods in LEVELS.items():
    of, clusters = (cells, list(cells.optimizer)) if level == "runs_" else (means, None)
    columns = [name, lost, *([GIVEN] if level == "partial_" else [])]
    problem = _problem(means, columns)
    if level == "runs_" and len(cells) == len(means):
      problem = problem or "one seed of each optimizer"
    if problem:
      reasons.append(f"{level}: {problem}" if level else problem)
      if not level:
        break  # the other levels have the same problem
      continue
    given = of[GIVEN].to_numpy() if level == "partial_" else None
    for method in methods:
      x, y = of[name].to_numpy(), of[lost].to_numpy()
      found = correlation(x, y, method, given=given, clusters=clusters, confidence=confidence)
      numbers = (found.value, *found.interval, found.p)
      names = (f"{level}{method}{part}" for part in LIMITS)
      row |= dict(zip(names, numbers, strict=True))
      if np.isnan(found.p):
        reasons.append(f"{level}p: {found.p_from}")
  return row | {"reason": "; ".join(dict.fromkeys(reasons))}


def _problem(means: pd.DataFrame, columns: Sequence[str]) -> str:
  """Why these columns have no correlation; empty where they have one."""
  least = len(columns) + 1
  if len(means) < least:
    return f"{len(means)} optimizers; at least {least} are needed"
  for column in columns:
    values = means[column].to_numpy(float)
    broken = list(means.optimizer[~np.isfinite(values)])
    if broken:
      return f"{column} is not finite for {', '.join(broken)}"
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
      return f"{column} is {values[0]:g} for all"
  return ""
