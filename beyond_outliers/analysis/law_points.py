"""The runs that a scaling law is fitted to, as a table: read, checked, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers.config.checks import nearest, require
from beyond_outliers.errors import ConfigError

COLUMNS = ("optimizer", "recipe", "parameters", "tokens", "loss", "seed")
# Columns that, where a table has them, must hold one value: losses over other data, or in other
# tokens, do not compare.
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
# Tokens per parameter are one ratio up to this: a run's tokens are whole steps of whole batches.
SAME_RATIO = 0.05

# Whatever pandas.DataFrame takes: a frame, a list of dictionaries, a dictionary of columns.
Table = Any


def read_points(points: Table, embedding: bool) -> tuple[pd.DataFrame, list[str]]:
  """(optimizer, recipe, seed, N, D, log_loss, tokens_per_parameter: a row per run; in words the
  rows that are left out).

  embedding: whether N counts the embedding's parameters; tokens per parameter always do, as in the
    study (arXiv 2509.23500). Left out: runs whose `status`, if there is such a column, is not
    "done", or whose loss is no finite number above zero.
  Errors: ConfigError for missing columns, numbers that are none, runs of different data, a run that
    is there twice."""
  try:
    frame = pd.DataFrame(points).reset_index(drop=True)
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f"points = {points!r}: no table of runs ({error}); give a pandas.DataFrame, or a list of rows"
    ) from None
  twice = list(frame.columns[frame.columns.duplicated()])
  require(not twice, "points", twice, "columns are there twice; leave one out")
  needed = COLUMNS if embedding else (*COLUMNS, "embedding")
  for column in needed:
    require(
      column in frame,
      "points",
      list(frame),
      f"no column {column!r}; a run is a row with {', '.join(needed)}",
    )
  for column in [name for name in ALIKE if name in frame]:
    values = list(dict.fromkeys(frame[column].map(str)))
    require(
      len(values) < 2,
      f"points: {column}",
      ", ".join(values),
      "losses over different data, or in different tokens, do not compare; fit them apart",
    )
  for column in ("optimizer", "recipe", "seed"):
    for row in frame.index[frame[column].isna()][:1]:
      raise ConfigError(f"points: row {row}: {column} is missing")
  for column in ("parameters", "tokens", *(() if embedding else ("embedding",))):
    frame[column] = _positive(frame, column)
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
      f"points: rows {list(same)} are one run, {_run(frame, row)}: leave all but one out; of a "
      "sweep, keep the tuned learning rate"
    )
  return table.reset_index(drop=True), left_out


def _positive(frame: pd.DataFrame, column: str) -> pd.Series:
  numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
  for row in frame.index[~(np.isfinite(numbers) & (numbers > 0))][:1]:
    raise ConfigError(
      f"points: row {row}: {column} = {_plain(frame[column][row])!r}: expected a number above zero"
    )
  return numbers


def _log_losses(frame: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
  """(log losses, NaN in rows that are left out; these in words)."""
  loss, left_out = pd.to_numeric(frame.loss, errors="coerce").to_numpy(float, copy=True), []
  status = frame["status"] if "status" in frame else ["done"] * len(frame)
  for row, state in enumerate(status):
    if state != "done":
      left_out.append(f"{_run(frame, row)}: {state}")
      loss[row] = np.nan
    elif not (np.isfinite(loss[row]) and loss[row] > 0):
      left_out.append(
        f"{_run(frame, row)}: loss = {_plain(frame.loss[row])!r} is no finite number above 0"
      )
      loss[row] = np.nan
  return np.log(loss), left_out


def _plain(value: Any) -> Any:
  """A value as it is written, without numpy's type."""
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
  """(the runs whose efficiency has something to be relative to; in words the optimizers that are
  left out).

  Errors: ConfigError for a reference of which there is no run, or several D/N under the study's
    law."""
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
