"""The runs that a scaling law is fitted to, as a table: made from workdirs, or given and checked;
and what is left out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis.tuning import (
  EXTENT,
  FULL_PRECISION,
  Tuning,
  run_frame,
  standing,
  study_rate,
  tunings_of,
)
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.config.sizes import SHAPE
from beyond_outliers.errors import ConfigError

COLUMNS = ("optimizer", "recipe", "parameters", "tokens", "loss", "seed")
# Columns that, where a table has them, must hold one value: losses on different data, or in
# different tokens, are not comparable.
ALIKE = (
  "data",
  "data.source",
  "data.fingerprint",
  "fingerprint",
  "tokenizer",
  "data.tokenizer",
  "vocab",
  "data.vocab",
)
# Columns of the table that `of_runs` makes.
OF_RUNS = (
  *("optimizer", "recipe", "size", "parameters", "embedding", "tokens", "loss", "seed"),
  *("learning_rate", "status", "fingerprint", "tokenizer", "run"),
)
# What the runs of one law may differ in: size and length.
GROWS = ("size", "steps", "batch_size", *(f"model.{name}" for name in SHAPE))
# Tokens per parameter count as one ratio within this, since runs consist of whole batches.
SAME_RATIO = 0.05

# Whatever pandas.DataFrame takes: a frame, a list of dictionaries, a dictionary of columns.
Table = Any


def of_runs(runs: Sequence[runs_lib.Run]) -> tuple[pd.DataFrame, list[str]]:
  """(one row per run at the chosen learning rate, for `scaling_law.fit`; sentences on what was left
  out, and why).

  A rate is chosen for every size and length. In full precision it is the best of the sweep, as
  `tuning.tunings` judges it; under a recipe the best in full precision, as in the study, or, where
  that was not run or nothing is in full precision, the best of the recipe's own sweep. All seeds at
  that rate are points. Left out are other rates, and unfinished and diverged runs.
  Columns: OF_RUNS; run is the workdir, loss the validation loss after the last step, embedding the
  number of the embedding's parameters.
  Errors: ConfigError for runs that differ in more than GROWS, a run that is there twice, or a
    sweep whose rates have no seed in common; WorkdirError for a damaged file of a run."""
  frame = run_frame(runs, but=GROWS)
  left_out = [
    standing(run)
    if run.status["status"] != "done"
    else f"{run.name}: done, but without a finite eval/loss at step {run.config.steps}"
    for run in frame.run[~np.isfinite(frame.loss)]
  ]
  rows = []
  for _, extent in frame.groupby(list(EXTENT)):
    found = {(t.recipe, t.optimizer): t for t in tunings_of(extent)}
    for (recipe, name), t in sorted(found.items()):
      full = None if recipe == FULL_PRECISION else found.get((FULL_PRECISION, name))
      rate, why = _chosen(t, full)
      if why:
        c = t.best[0].config
        left_out.append(f"{name}, {recipe}, {c.size}, {c.steps} steps: {why}")
      own = extent[(extent.optimizer == name) & (extent.recipe == recipe) & (extent.rate == rate)]
      rows += [_point(run, recipe, loss) for run, loss in zip(own.run, own.loss, strict=True)]
  points = pd.DataFrame(rows, columns=list(OF_RUNS))
  return points[np.isfinite(points.loss.astype(float))].reset_index(drop=True), left_out


def _chosen(t: Tuning, full: Tuning | None) -> tuple[float | None, str]:
  """(the learning rate of a sweep's points, or None; a sentence on why, and instead of which).

  full: the same optimizer's sweep in full precision, if `t` is of a recipe."""
  rate = study_rate(t, full)
  if full is None:
    judges, why = [t], "the best"
  elif rate == full.learning_rate:
    judges, why = [full], "the best in full precision"
  else:
    judges = [full, t]
    why = f"its own best: {full.learning_rate:g}, the best in full precision, was not run"
  for sweep in judges:
    if len(sweep.losses) > 1 and not math.isfinite(sweep.loss):
      return None, f"no learning rate has all its seeds done, recipe {sweep.recipe}"
  others = ", ".join(f"{other:g}" for other in t.losses if other != rate)
  if not others and len(judges) == 1:
    return rate, ""
  return rate, f"learning rate {rate:g} is taken, {why}" + (f"; not {others}" if others else "")


def _point(run: runs_lib.Run, recipe: str, loss: float) -> dict[str, Any]:
  c, counts, trained_on = run.config, run.parameter_counts, run.trained_on
  values = (
    *(c.optimizer.name, recipe, c.size, counts["total"], counts["embedding"]),
    *(c.steps * c.batch_size * c.context, loss, c.seed, c.optimizer.learning_rate),
    *(run.status["status"], trained_on["fingerprint"], trained_on["tokenizer"], run.name),
  )
  return dict(zip(OF_RUNS, values, strict=True))


def read_points(points: Table, embedding: bool) -> tuple[pd.DataFrame, list[str]]:
  """(one row per run: optimizer, recipe, seed, N, D, log_loss, tokens_per_parameter; sentences on
  the rows that are left out).

  embedding: whether N counts the embedding's parameters; tokens per parameter always do, as in the
    study (arXiv 2509.23500). Left out: runs whose `status`, if there is such a column, is not
    "done", or whose loss is not a finite number above zero.
  Errors: ConfigError for missing columns, values that are not numbers, runs on different data, and
    a run that is there twice."""
  frame = _checked_frame(points, embedding)
  N = frame.parameters - (0 if embedding else frame.embedding)
  for row in frame.index[N <= 0][:1]:
    raise ConfigError(
      f"points: row {row}: embedding = {frame.embedding[row]:g} of {frame.parameters[row]:g} "
      "parameters leaves none; `parameters` counts the embedding too"
    )
  log_loss, left_out = _log_losses(frame)
  table = pd.DataFrame(
    {
      "optimizer": frame.optimizer.map(str),
      "recipe": frame.recipe.map(str),
      "seed": frame.seed,
      "N": N.astype(float),
      "D": frame.tokens.astype(float),
      "log_loss": log_loss,
      "tokens_per_parameter": frame.tokens / frame.parameters,
    }
  )
  table = table[np.isfinite(log_loss)]
  keys = ["optimizer", "recipe", "N", "D", "seed"]
  for row in table.index[table.duplicated(keys)][:1]:
    same = frame.index[(table.reindex(frame.index)[keys] == table.loc[row, keys]).all(axis=1)]
    raise ConfigError(
      f"points: rows {list(same)} are one run, {_run(frame, row)}; leave out all but one (of a "
      "sweep, keep the tuned learning rate)"
    )
  return table.reset_index(drop=True), left_out


def _checked_frame(points: Table, embedding: bool) -> pd.DataFrame:
  """The table as a frame, checked for all that a law needs, with sizes as numbers. Errors: as
  `read_points`."""
  try:
    frame = pd.DataFrame(points).reset_index(drop=True)
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f"points = {points!r}: not a table of runs ({error}); give a pandas.DataFrame, or a list of "
      "rows"
    ) from None
  twice = list(frame.columns[frame.columns.duplicated()])
  require(not twice, "points", twice, "these columns appear twice; leave one out")
  needed = COLUMNS if embedding else (*COLUMNS, "embedding")
  for column in needed:
    require(
      column in frame,
      "points",
      list(frame),
      f"no column {column!r}; a run is a row with {', '.join(needed)}",
    )
  if frame.empty:
    raise ConfigError("points: there are no runs in the table; give some that are done")
  for column in [name for name in ALIKE if name in frame]:
    values = list(dict.fromkeys(frame[column].map(str)))
    require(
      len(values) < 2,
      f"points: {column}",
      ", ".join(values),
      "losses on different data, or in different tokens, cannot be compared; fit them separately",
    )
  for column in ("optimizer", "recipe", "seed"):
    for row in frame.index[frame[column].isna()][:1]:
      raise ConfigError(f"points: row {row}: {column} is missing")
  for column in ("parameters", "tokens", *(() if embedding else ("embedding",))):
    frame[column] = _positive(frame, column)
  return frame


def _positive(frame: pd.DataFrame, column: str) -> pd.Series:
  numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
  for row in frame.index[~(np.isfinite(numbers) & (numbers > 0))][:1]:
    raise ConfigError(
      f"points: row {row}: {column} = {_plain(frame[column][row])!r}: expected a number above zero"
    )
  return numbers


def _log_losses(frame: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
  """(log losses, NaN in rows that are left out; sentences on these rows)."""
  loss, left_out = pd.to_numeric(frame.loss, errors="coerce").to_numpy(float, copy=True), []
  status = frame["status"] if "status" in frame else ["done"] * len(frame)
  for row, state in enumerate(status):
    if state != "done":
      left_out.append(f"{_run(frame, row)}: {state}")
      loss[row] = np.nan
    elif not (np.isfinite(loss[row]) and loss[row] > 0):
      left_out.append(
        f"{_run(frame, row)}: loss = {_plain(frame.loss[row])!r} is not a finite number above 0"
      )
      loss[row] = np.nan
  return np.log(loss), left_out


def _plain(value: Any) -> Any:
  """A value without numpy's type, for messages."""
  return value.item() if isinstance(value, np.generic) else value


def _run(frame: pd.DataFrame, row: int) -> str:
  one = frame.loc[row]
  return (
    f"{one.optimizer}, {one.recipe}, {one.parameters:.4g} parameters, {one.tokens:.4g} tokens, "
    f"seed {one.seed}"
  )


def with_references(
  table: pd.DataFrame, law: str, shared: tuple[str, ...], reference: tuple[str, str]
) -> tuple[pd.DataFrame, list[str]]:
  """(the runs that have a reference for their efficiency; sentences on the optimizers left out).

  Errors: ConfigError for a reference without runs, or several D/N under the study's law."""
  pairs = {pair: None for pair in zip(table.optimizer, table.recipe, strict=True)}
  require(
    reference in pairs,
    "reference",
    reference,
    f"no run of this (optimizer, recipe); {nearest(str(reference), list(map(str, pairs)))}",
  )
  if law == "study":
    ratios = table.tokens_per_parameter
    require(
      ratios.max() <= (1 + SAME_RATIO) * ratios.min(),
      "points: tokens per parameter",
      sorted({float(f"{ratio:.3g}") for ratio in ratios}),
      'the law "study" holds at one ratio; give the runs of one, or law="two_term"',
    )
  if law == "two_term" or "A" in shared:
    return table, []
  with_reference = set(table.optimizer[table.recipe == reference[1]])
  alone = [name for name in dict.fromkeys(table.optimizer) if name not in with_reference]
  left_out = [
    f"{name}: no run of recipe {reference[1]!r}, which its rho would be relative to"
    for name in alone
  ]
  return table[table.optimizer.isin(with_reference)].reset_index(drop=True), left_out
