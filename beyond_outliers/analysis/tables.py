"""Tables in Markdown, with values from workdirs. Columns are headings and functions of an item."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import ptq_degradation
from beyond_outliers.analysis.common_loss import Landing, Point
from beyond_outliers.analysis.qat_gap import Gap
from beyond_outliers.analysis.statistics import Comparison, Estimate, estimate
from beyond_outliers.analysis.tuning import FULL_PRECISION, Tuning
from beyond_outliers.config.checks import nearest, require

Item = TypeVar("Item")


def tuning_table(tunings: Iterable[Tuning]) -> str:
  """Each optimizer's sweep: the best rate, its neighbours, and problems in its runs."""
  return markdown_table(TUNING_COLUMNS, tunings)


def _neighbour(t: Tuning, offset: int) -> str:
  rates = sorted(t.losses)
  at = rates.index(t.learning_rate) + offset
  inside = 0 <= at < len(rates)
  return f"{decimals(t.losses[rates[at]], 4)} at {rates[at]:g}" if inside else "edge of the grid"


def _largest_count(runs: Iterable[runs_lib.Run], metric: str) -> str:
  return f"{max(_last_count(run, metric) for run in runs):.0f}"


def _last_count(run: runs_lib.Run, metric: str) -> float:
  """A run's last value of a count; infinite for an unfinished run, zero if it isn't logged."""
  if run.status["status"] != "done":
    return math.inf
  counted = run.metrics().get(metric)
  return 0.0 if counted is None else counted.dropna().iloc[-1]


TUNING_COLUMNS: dict[str, Callable[[Tuning], str]] = {
  "optimizer": lambda t: t.optimizer,
  "learning rate": lambda t: f"{t.learning_rate:g}",
  "validation loss": lambda t: decimals(t.loss, 4),
  "next lower rate": lambda t: _neighbour(t, -1),
  "next higher rate": lambda t: _neighbour(t, +1),
  "skipped updates": lambda t: _largest_count(t.best, "skipped"),
  "roots kept": lambda t: _largest_count(t.best, "roots/kept"),
  "training seconds": lambda t: _largest_count(t.best, "seconds"),
}


def retuning_table(tunings: Sequence[Tuning]) -> str:
  """Each optimizer's best rate in full precision and under each recipe that it was tuned for, and
  the losses at both under the recipe."""
  return markdown_table(retuning_columns(tunings), retuned(tunings))


def retuned(tunings: Sequence[Tuning]) -> list[Tuning]:
  """Sweeps under a recipe, of optimizers that also have runs in full precision."""
  full = {t.optimizer for t in tunings if t.recipe == FULL_PRECISION}
  return [
    t for t in tunings if t.recipe != FULL_PRECISION and t.optimizer in full and len(t.losses) > 1
  ]


def retuning_columns(tunings: Sequence[Tuning]) -> dict[str, Callable[[Tuning], str]]:
  """Columns of `retuning_table`; tunings: all sweeps."""
  full = {t.optimizer: t.learning_rate for t in tunings if t.recipe == FULL_PRECISION}

  def loss_at_the_full_rate(t: Tuning) -> str:
    rate = full[t.optimizer]
    return f"{t.losses[rate]:.4f}" if rate in t.losses else "not run"

  return {
    "optimizer": lambda t: t.optimizer,
    "recipe": lambda t: t.recipe,
    "best rate in full precision": lambda t: f"{full[t.optimizer]:g}",
    "best rate under the recipe": lambda t: (
      f"{t.learning_rate:g}" + (" (edge of the grid)" if t.at_the_edge else "")
    ),
    "validation loss at the former": loss_at_the_full_rate,
    "at the latter": lambda t: f"{t.loss:.4f}",
  }


def qat_gap_table(gaps: Iterable[Gap]) -> str:
  """Each optimizer's loss in full precision and under a recipe, and the gap: means over seeds ±
  standard errors, for the gap those of paired differences."""
  return markdown_table(GAP_COLUMNS, gaps)


def _gap_rates(gap: Gap) -> str:
  full, under = gap.rates
  return f"{full:g}" if full == under else f"{full:g}, then {under:g}"


def _gap_bits(gap: Gap) -> str:
  known = np.isfinite(gap.bits_per_byte).all()
  return plus_minus(gap.bits, 4, "+") if known else "unknown"


GAP_COLUMNS: dict[str, Callable[[Gap], str]] = {
  "optimizer": lambda gap: gap.optimizer,
  "recipe": lambda gap: gap.recipe,
  "learning rate": _gap_rates,
  "full precision": lambda gap: plus_minus(estimate(gap.losses[0]), 4),
  "under the recipe": lambda gap: plus_minus(estimate(gap.losses[1]), 4),
  "gap, nats": lambda gap: plus_minus(gap.loss, 4, "+"),
  "gap, bits per byte": _gap_bits,
  "gap, %": lambda gap: plus_minus(gap.percent, 2, "+"),
  "seeds": lambda gap: str(len(gap.seeds)),
}


def gap_comparison_table(compared: Iterable[tuple[str, Comparison]]) -> str:
  """Gaps, and differences of two optimizers' gaps, with intervals and p after Holm."""
  return markdown_table(GAP_COMPARISON_COLUMNS, compared)


def ptq_comparison_table(compared: Iterable[tuple[str, str, Comparison]]) -> str:
  """Differences of two optimizers' costs after training, with intervals and p after Holm."""
  return markdown_table(PTQ_COMPARISON_COLUMNS, compared)


# Columns for rows that end with a Comparison.
_COMPARISON_COLUMNS: dict[str, Callable[[Any], str]] = {
  "95 % interval": lambda row: " … ".join(f"{end:+.4f}" for end in row[-1].interval),
  "p": lambda row: f"{row[-1].p:.3f}",
  "seeds": lambda row: str(row[-1].n),
  "told apart": lambda row: "no" if row[-1].tie else "yes",
}
GAP_COMPARISON_COLUMNS: dict[str, Callable[[tuple[str, Comparison]], str]] = {
  "recipe": lambda row: row[0],
  "gap": lambda row: row[1].name,
  "nats": lambda row: f"{row[1].value:+.4f}",
  **_COMPARISON_COLUMNS,
}
PTQ_COMPARISON_COLUMNS: dict[str, Callable[[tuple[str, str, Comparison]], str]] = {
  "recipe": lambda row: row[0],
  "method": lambda row: row[1],
  "pair": lambda row: row[2].name,
  "difference": lambda row: f"{row[2].value:+.4f}",
  **_COMPARISON_COLUMNS,
}


def degradation_table(found: pd.DataFrame, metric: str = "loss_difference", digits: int = 4) -> str:
  """Markdown: one row per (recipe, method), one column per optimizer; means over seeds ± their
  standard error, the best of each recipe and optimizer in bold. A recipe's rows are in order of the
  mean over all optimizers, best first. loss_difference: nats, to full precision on the same tokens.

  A metric that is not finite counts as infinite. Runs that were trained quantized are left out.
  Errors: ConfigError for a metric that no cell has; if an optimizer has runs of several learning
  rates or lengths, or two of one seed; or if cells differ in what they were measured on: means
  would be meaningless."""
  measured = found[found.method != "none"].dropna(axis="columns", how="all")
  _check_metric(metric, measured, found.attrs.get("left_out", []))
  measured = measured[measured[metric].notna()]
  ptq_degradation.check_cells(measured)
  means = measured.groupby(["recipe", "method", "optimizer"])[metric].agg(["mean", "sem"])
  estimates = {cell: Estimate(*values) for cell, *values in means.itertuples(name=None)}
  sign = -1 if ptq_degradation.HIGHER_IS_BETTER.search(metric) else 1
  best = (sign * means["mean"]).groupby(["recipe", "optimizer"]).min() * sign
  order = means["mean"].groupby(["recipe", "method"]).mean()

  def cell_text(row: tuple[str, str], optimizer: str) -> str:
    recipe, method = row
    value = estimates.get((recipe, method, optimizer))
    if value is None:
      return ""
    text = plus_minus(value, digits, "+" if "difference" in metric else "")
    return f"**{text}**" if value.mean == best[recipe, optimizer] else text

  return markdown_table(
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


def _check_metric(metric: str, measured: pd.DataFrame, left_out: Sequence[str]) -> None:
  others = (*ptq_degradation.ORIGIN, *ptq_degradation.MEASURED_ON, "step")
  known = [str(name) for name in measured.select_dtypes("number") if name not in others]
  why = f" ({left_out[0]})" if left_out else ""
  command = ptq_degradation.evaluation_command()
  remedy = f"these runs have no cell of a recipe{why}; measure some: {command}"
  require(bool(known), "--degradation", metric, remedy)
  require(metric in known, "--degradation", metric, f"no cell has it; {nearest(metric, known)}")


def common_loss_table(landings: Iterable[Landing], loss: float) -> str:
  """Each optimizer's nearest run, evaluation and checkpoint to the common loss, the first
  checkpoint below it, and the number of steps to run next."""
  return markdown_table(landing_columns(loss), landings)


def landing_columns(loss: float) -> dict[str, Callable[[Landing], str]]:
  """Columns of `common_loss_table`."""

  def at(point: Point | None) -> str:
    return f"{decimals(point.loss, 4)} at {point.step}" if point else "none"

  return {
    "optimizer": lambda x: x.optimizer,
    "learning rate": lambda x: f"{x.learning_rate:g}",
    "full length": lambda x: at(x.best),
    "steps to the common loss": lambda x: str(x.steps),
    "nearest end of a run": lambda x: at(x.ending),
    "off by": lambda x: decimals(x.ending.loss - loss, 4, "+"),
    "nearest evaluation": lambda x: at(x.evaluation),
    "nearest checkpoint": lambda x: at(x.checkpoint),
    "first checkpoint below": lambda x: at(x.crossing),
  }


def plus_minus(value: Estimate, digits: int, sign: str = "") -> str:
  """mean ± standard error; the mean alone where that is NaN."""
  mean = decimals(value.mean, digits, sign)
  return mean if math.isnan(value.stderr) else f"{mean} ± {decimals(value.stderr, digits)}"


def decimals(value: float, digits: int, sign: str = "") -> str:
  """A number with that many digits after the point, or in scientific notation if it is huge, as
  losses of diverged runs are."""
  return f"{value:{sign}.{digits}f}" if abs(value) < 1e6 else f"{value:{sign}.3g}"


def markdown_table(columns: Mapping[str, Callable[[Item], str]], items: Iterable[Item]) -> str:
  """One row per item under the columns' headings."""
  rows = [list(columns), ["---"] * len(columns)]
  rows += [[text(item) for text in columns.values()] for item in items]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)
