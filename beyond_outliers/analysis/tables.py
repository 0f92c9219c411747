"""Tables in Markdown, every number of them read from workdirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis.qat_gap import Estimate, Gap, estimate
from beyond_outliers.analysis.tuning import FULL_PRECISION, Landing, Tuning


def tuning(tunings: Sequence[Tuning]) -> str:
  """What each optimizer's sweep came to: the best rate, its neighbours, and whether anything went
  wrong at it."""
  rows: list[Sequence[str]] = [
    (
      "optimizer",
      "learning rate",
      "validation loss",
      "next lower rate",
      "next higher rate",
      "skipped updates",
      "roots kept",
      "training seconds",
    )
  ]
  for t in tunings:
    rates = sorted(t.losses)
    at = rates.index(t.learning_rate)
    beside = [
      f"{t.losses[rates[i]]:.4f} at {rates[i]:g}" if 0 <= i < len(rates) else "edge of the grid"
      for i in (at - 1, at + 1)
    ]
    counts = [
      f"{max(_last(run, metric) for run in t.best):.0f}"
      for metric in ("skipped", "roots/kept", "seconds")
    ]
    rows.append((t.optimizer, f"{t.learning_rate:g}", f"{t.loss:.4f}", *beside, *counts))
  return markdown(rows)


def _last(run: runs_lib.Run, count: str) -> float:
  """Of something that a run counts; infinite if it is not done, zero where it has nothing to
  count."""
  counted = run.metrics().get(count)
  return (
    math.inf
    if run.status["status"] != "done"
    else 0.0
    if counted is None
    else counted.dropna().iloc[-1]
  )


def retuning(tunings: Sequence[Tuning]) -> str:
  """Each optimizer's best rate in full precision and under the recipes it was tuned under, and what
  that gained."""
  rows: list[Sequence[str]] = [
    (
      "optimizer",
      "recipe",
      "best rate in full precision",
      "best rate under the recipe",
      "validation loss at the former",
      "at the latter",
    )
  ]
  full = {t.optimizer: t.learning_rate for t in tunings if t.recipe == FULL_PRECISION}
  for t in tunings:
    if t.recipe != FULL_PRECISION and t.optimizer in full and len(t.losses) > 1:
      rate = full[t.optimizer]
      before = f"{t.losses[rate]:.4f}" if rate in t.losses else "not run"
      edge = " (edge of the grid)" if t.at_the_edge else ""
      rows.append(
        (t.optimizer, t.recipe, f"{rate:g}", f"{t.learning_rate:g}{edge}", before, f"{t.loss:.4f}")
      )
  return markdown(rows)


def gaps(found: Sequence[Gap]) -> str:
  """What each recipe costs each optimizer, means over seeds ± standard errors; the gap's is of
  paired differences."""
  rows: list[Sequence[str]] = [
    (
      "optimizer",
      "recipe",
      "learning rate",
      "full precision",
      "under the recipe",
      "gap, nats",
      "gap, bits per byte",
      "gap, %",
      "seeds",
    )
  ]
  for gap in found:
    full, under = gap.rates
    rate = f"{full:g}" if full == under else f"{full:g}, then {under:g}"
    losses = [plus_minus(estimate(side), 4) for side in gap.losses]
    bits = plus_minus(gap.bits, 4, "+") if np.isfinite(gap.bits_per_byte).all() else "unknown"
    rows.append(
      (
        gap.optimizer,
        gap.recipe,
        rate,
        *losses,
        plus_minus(gap.loss, 4, "+"),
        bits,
        plus_minus(gap.percent, 2, "+"),
        str(len(gap.seeds)),
      )
    )
  return markdown(rows)


def common_loss(landings: Sequence[Landing], loss: float) -> str:
  """How far each optimizer's nearest run, evaluation and checkpoint are from the common loss, and
  what to run next."""
  rows: list[Sequence[str]] = [
    (
      "optimizer",
      "learning rate",
      "full length",
      "steps to the common loss",
      "nearest end of a run",
      "off by",
      "nearest evaluation",
      "nearest checkpoint",
    )
  ]
  at = lambda point: f"{point.loss:.4f} at {point.step}" if point else "none"
  rows += [
    (
      x.optimizer,
      f"{x.learning_rate:g}",
      at(x.best),
      str(x.steps),
      at(x.ending),
      f"{x.ending.loss - loss:+.4f}",
      at(x.evaluation),
      at(x.checkpoint),
    )
    for x in landings
  ]
  return markdown(rows)


def plus_minus(value: Estimate, digits: int, sign: str = "") -> str:
  mean = f"{value.mean:{sign}.{digits}f}"
  return mean if math.isnan(value.stderr) else f"{mean} ± {value.stderr:.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """The first row is the head."""
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])
