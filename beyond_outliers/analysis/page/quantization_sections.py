"""Sections on quantization after training: what it costs, how the error grows, what predicts it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from beyond_outliers.analysis import plots, predictors, tables
from beyond_outliers.analysis.along_training import jump
from beyond_outliers.analysis.page.evidence import Evidence, Found, RunGroup, attempt
from beyond_outliers.analysis.page.section import (
  Drawing,
  Part,
  Table,
  comparison_numbers,
  frame_table,
)
from beyond_outliers.analysis.page.text import (
  EVALUATE,
  NOTHING,
  analysis_command,
  field,
  number,
  with_error,
)
from beyond_outliers.analysis.plots import style
from beyond_outliers.analysis.ptq_degradation import compare_optimizers

LOST = "loss_difference"
INTERVAL = "loss_difference_interval"
# Predictors with a panel: outliers of linear layers' inputs and of the residual stream, and errors.
SHOWN = (
  *("max_to_median/linear", "max_to_mean/linear", "kurtosis/linear"),
  *("rms_kurtosis/residual", "outlier_channels/residual", "sqnr/linear"),
  *("R_L", "R_L_centred", "inherited"),
)
LEAST = 3  # optimizers needed for a correlation
SEVERAL = 3  # pairs of recipe and method with a figure of their own, at most


def degradation(evidence: Evidence, group: RunGroup) -> Part:
  """What quantization after training costs each optimizer, by recipe and method."""
  frame = group.cells.value
  measured = frame[pd.to_numeric(frame[LOST], errors="coerce").notna()] if LOST in frame else frame
  flags = f"--degradation={LOST}", *group.cell_flags
  command = analysis_command(evidence.roots_of(group), *flags)
  if not len(measured):
    return missing(group, group.cells, "no quantized cell", f"{EVALUATE} --methods=rtn,gptq")
  caption = (
    "Loss of the quantized model − in full precision, on the same tokens (nats): means over seeds "
    "± standard errors; of one seed with the 95 % interval over documents. Best of a row in bold."
  )
  return Part(
    group.title,
    measured["run"].nunique(),
    figures=[
      Drawing(
        f"degradation.{group.name}",
        "Means over seeds ± standard errors; small points are seeds. The cheapest method on top.",
        functools.partial(plots.plot_degradation, measured),
      )
    ],
    tables=[
      _by_optimizer(
        f"degradation.{group.name}", caption, measured, _intervals(group.measured.value)
      ),
      *_compared_optimizers(group.name, measured),
    ],
    command=command,
    left_out=frame.attrs.get("left_out", []),
  )


def _compared_optimizers(name: str, measured: pd.DataFrame) -> list[Table]:
  """A table of the pairs that are told apart, if there are any; its file has all pairs."""
  compared = compare_optimizers(measured, LOST)
  apart = [row for row in compared if not row[-1].tie]
  numbers = comparison_numbers(["recipe", "method", "pair", LOST], compared)
  caption = (
    f"The {len(apart)} of {len(compared)} pairs of optimizers that seeds tell apart: paired by "
    "seed, intervals and p of Student's t after Holm's correction over a method's pairs."
  )
  columns = tables.PTQ_COMPARISON_COLUMNS
  return [Table(f"degradation_compared.{name}", caption, columns, apart, numbers)] if apart else []


def _intervals(cells: pd.DataFrame) -> dict[tuple[str, str, str], list[float]]:
  """Intervals of the losses' differences over documents, by run, recipe and method."""
  if INTERVAL not in cells:
    return {}
  rows = cells[cells[INTERVAL].map(lambda pair: isinstance(pair, list) and None not in pair)]
  keys = zip(rows["run"], rows["recipe"], rows["method"], strict=True)
  return dict(zip(keys, rows[INTERVAL], strict=True))


def _by_optimizer(
  name: str,
  caption: str,
  frame: pd.DataFrame,
  intervals: Mapping[tuple[str, str, str], Sequence[float]],
) -> Table:
  """One row per recipe and method, one column per optimizer."""
  optimizers = style.in_order(frame["optimizer"])
  means = style.over_seeds(frame, ["recipe", "method", "optimizer"], LOST)
  cells = {tuple(row[:3]): row for row in style.named_rows(means)}
  best = means.groupby(["recipe", "method"])["mean"].min()
  runs = {
    tuple(row[:3]): row.run
    for row in style.named_rows(frame[["recipe", "method", "optimizer", "run"]])
  }
  order = means.groupby(["recipe", "method"])["mean"].mean()
  pairs = sorted(order.index, key=lambda pair: (str(pair[0]), order[pair], str(pair[1])))

  def text(pair: tuple[str, str], optimizer: str) -> str:
    row = cells.get((*pair, optimizer))
    if row is None:
      return NOTHING
    shown = with_error(row.mean, row.sem, 4, "+")
    interval = intervals.get((runs[(*pair, optimizer)], *pair))
    if row.count == 1 and interval:
      shown += f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"**{shown}**" if row.mean == best[pair] and len(optimizers) > 1 else shown

  columns: dict[str, Callable[[Any], str]] = {
    "recipe": lambda pair: str(pair[0]),
    "method": lambda pair: str(pair[1]),
    **{optimizer: functools.partial(text, optimizer=optimizer) for optimizer in optimizers},
  }
  kept = ["recipe", "method", "optimizer", "seed", LOST, "relative", "kl", "agreement", "run"]
  numbers = frame[[column for column in kept if column in frame]]
  return Table(name, caption, columns, pairs, numbers)


def predictors_of_degradation(evidence: Evidence, group: RunGroup) -> Part:
  """What correlates with degradation over optimizers: outliers, and the error at the end."""
  frame = group.cells.value
  if not len(frame):
    return missing(group, group.cells, "no quantized cell", f"{EVALUATE} --propagation")
  judged = attempt(lambda: predictors.correlations(frame, LOST), pd.DataFrame())
  worth = judged.value
  if not len(worth) or not worth["spearman"].notna().any():
    return missing(group, judged, _no_correlation(worth), f"{EVALUATE} --propagation")
  worth = worth[worth[["spearman", "pearson"]].notna().any(axis=1)]
  worth = worth.sort_values(
    ["recipe", "method", "spearman"], key=lambda c: -c.abs() if c.name == "spearman" else c
  )
  figures = [
    Drawing(
      f"predictors.{group.name}.{at}",
      "What was lost against each predictor, and Spearman's coefficient over optimizers with its "
      "95 % interval. Large: means over seeds; small: seeds. Outliers are of linear layers' inputs "
      "(linear) or the residual stream (residual); sqnr, signal to quantization noise, in dB. R_L: "
      "R after the final norm; R_L_centred: the same against what differs between tokens; "
      "inherited: the share of it that came into the last block's last matrix.",
      functools.partial(
        plots.plot_predictors,
        rows,
        worth,
        predictors=[name for name in SHOWN if name in rows and rows[name].notna().any()],
      ),
    )
    for at, rows in enumerate(apart(frame), 1)
  ]
  return Part(
    group.title,
    frame["run"].nunique(),
    figures=figures,
    tables=[_correlations_table(group.name, worth)],
    command="analysis.predictors.correlations(analysis.predictors.frame(runs"
    f"{group.cell_arguments})), from Python",
    left_out=frame.attrs.get("left_out", []),
  )


def _correlations_table(name: str, worth: pd.DataFrame) -> Table:
  """A table of the SHOWN predictors; its file has all. worth: from `predictors.correlations`."""

  def coefficient(row: Any, name: str) -> str:
    value, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})" if value == value else NOTHING

  return Table(
    f"predictors.{name}",
    "Correlation over optimizers (means over seeds) of what was lost with each predictor: value, "
    "95 % interval, exact p; `partial` is given the loss in full precision. Strongest first. p is "
    "of one predictor: of twenty that predict nothing, one is below .05. The file has them all.",
    {
      "recipe": lambda row: str(row.recipe),
      "method": lambda row: str(row.method),
      "predictor": lambda row: str(row.predictor),
      "Spearman": functools.partial(coefficient, name="spearman"),
      "p": lambda row: number(row.spearman_p, ".3f"),
      "Pearson": functools.partial(coefficient, name="pearson"),
      "p ": lambda row: number(row.pearson_p, ".3f"),
      "partial Spearman": functools.partial(coefficient, name="partial_spearman"),
      "optimizers": lambda row: str(row.optimizers),
      "runs": lambda row: str(row.runs),
    },
    style.named_rows(worth[worth["predictor"].isin(SHOWN)]),
    worth,
  )


def _no_correlation(worth: pd.DataFrame) -> str:
  """Why no predictor has a correlation, in one sentence."""
  most = int(worth["optimizers"].max()) if len(worth) else 0
  if most < LEAST:
    there = f"there {'is' if most == 1 else 'are'} {most}"
    return f"a correlation takes {LEAST} optimizers with cells that were measured alike; {there}"
  return "; ".join(dict.fromkeys(worth["reason"])) or "no predictor varies"


def along_training(evidence: Evidence, group: RunGroup) -> Part:
  """How degradation changes along a run, with the learning rate and its cool-down."""
  along = group.along.value
  if not len(along) or along["step"].nunique() < 2:
    why = "no run has cells of two checkpoints"
    return missing(group, group.along, why, f"{EVALUATE} --steps=all")
  figure = Drawing(
    f"along_training.{group.name}",
    "Above: δ, how much quantization raises the validation loss (CE, cross entropy), of every "
    "evaluated checkpoint; thin lines are runs, thick ones means over seeds. Below: the learning "
    "rate over its peak.",
    functools.partial(plots.plot_along_training, along),
  )
  jumps = jump(along)
  keys = ["recipe", "method", "average", "optimizer"]
  keys = [key for key in keys if key != "average" or jumps["average"].any()]

  def percent(row: Any, name: str) -> str:
    return with_error(100 * getattr(row, name), 100 * getattr(row, f"{name}_stderr"), 2, "+")

  known = jumps[jumps["seeds"] > 0]
  table = frame_table(
    f"along_training.{group.name}",
    "δ in percent, means over seeds ± standard errors: mean over the checkpoints at the peak rate, "
    "from the first of these to the last, after the last step, and the jump from the mean to it.",
    known,
    {
      **{key: functools.partial(field, name=key) for key in keys},
      "at the peak": functools.partial(percent, name="constant"),
      "change at the peak": functools.partial(percent, name="change"),
      "at the end": functools.partial(percent, name="end"),
      "jump": functools.partial(percent, name="jump"),
      "seeds": lambda row: str(row.seeds),
    },
  )
  return Part(
    group.title,
    along["run"].nunique(),
    figures=[figure],
    tables=[table] if len(known) else [],
    command="analysis.along_training.jump(analysis.along_training.frame(runs"
    f"{group.cell_arguments})), from Python",
    left_out=[*along.attrs["left_out"], *(reason for reason in jumps["reason"] if reason)],
  )


def apart(frame: pd.DataFrame) -> list[pd.DataFrame]:
  """The rows of each pair of recipe and method, for the first SEVERAL."""
  return [style.of_quantization(frame, pair) for pair in style.quantizations(frame)[:SEVERAL]]


def missing(group: RunGroup, found: Found[Any], why: str, command: str) -> Part:
  """A part without data: why, and the command that makes them, unless the problem has its own."""
  command = "" if "python -m " in found.problem else command
  return Part(group.title, len(group.runs), missing=found.problem or why, command=command)
