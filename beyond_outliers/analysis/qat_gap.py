"""The gap of quantization-aware training: a run's final validation loss under a recipe, less that
of the same run in full precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis.statistics import (
  Comparison,
  Estimate,
  compare_differences,
  compare_pairs,
  estimate,
)
from beyond_outliers.analysis.tuning import (
  FULL_PRECISION,
  Tuning,
  final_metric,
  run_frame,
  standing,
  study_rate,
  tunings_of,
)


@dataclasses.dataclass(frozen=True)
class Gap:
  """Paired gap of one optimizer under one recipe: by seed, equal initial parameters and batches."""

  optimizer: str
  recipe: str
  rates: tuple[float, float]  # learning rates in full precision and under the recipe
  seeds: tuple[int, ...]  # those that both sides have
  # [2, seeds]: in full precision, and under the recipe.
  losses: np.ndarray  # validation losses in nats
  bits_per_byte: np.ndarray  # infinite where a dataset has no count of its bytes

  @property
  def loss(self) -> Estimate:
    """Mean difference in nats; a seed's effect on both sides cancels in its standard error."""
    return estimate(self.losses[1] - self.losses[0])

  @property
  def bits(self) -> Estimate:
    """Mean difference in bits per byte."""
    return estimate(self.bits_per_byte[1] - self.bits_per_byte[0])

  @property
  def percent(self) -> Estimate:
    """Mean difference in percent of the loss in full precision."""
    return estimate(100 * (self.losses[1] - self.losses[0]) / self.losses[0])


def qat_gaps(
  runs: Sequence[runs_lib.Run], *, own_rates: bool = False
) -> tuple[list[Gap], list[str]]:
  """A `Gap` per optimizer and recipe, by recipe, smallest first; and sentences on those left out.

  As in the study (arXiv 2509.23500, section 3), both sides have the learning rate that is best in
  full precision; if a recipe was not trained at that rate, its side has its own best.
  own_rates: each side has its own best rate.
  Errors: ConfigError as `tuning.tunings`."""
  frame = run_frame(runs)
  left_out = [standing(run) for run in frame.run if run.status["status"] != "done"]
  # A rate is chosen by the seeds common to all rates; the gap then has all seeds at that rate.
  tunings = {(t.recipe, t.optimizer): t for t in tunings_of(frame)}
  gaps = []
  for recipe, name in sorted(set(zip(frame.recipe, frame.optimizer, strict=True))):
    full, under = tunings.get((FULL_PRECISION, name)), tunings[recipe, name]
    if recipe == FULL_PRECISION:
      if not any((other, name) in tunings for other in set(frame.recipe) - {recipe}):
        left_out.append(f"{name}: no run under a recipe")
    elif full is None:
      left_out.append(f"{name}: no run in full precision")
    elif len(full.losses) > 1 and not math.isfinite(full.loss):
      left_out.append(f"{name}: no learning rate with all seeds done in full precision")
    else:
      rate = under.learning_rate if own_rates else study_rate(under, full)
      gap, alone = _pair(frame, full, under, rate)
      left_out += alone
      gaps += [gap] if gap else []
  return sorted(gaps, key=lambda gap: (gap.recipe, gap.loss.mean)), left_out


def gaps_at_own_rates(runs: Sequence[runs_lib.Run], gaps: Sequence[Gap]) -> list[Gap]:
  """What `qat_gaps` finds with own_rates; empty if these are the rates of `gaps` anyway."""
  own, _ = qat_gaps(runs, own_rates=True)
  return own if [gap.rates for gap in own] != [gap.rates for gap in gaps] else []


def compare_gaps(gaps: Sequence[Gap]) -> list[tuple[str, Comparison]]:
  """(recipe, whether seeds tell a gap from zero, or two optimizers' gaps from each other), by
  recipe, the surest first.

  Gaps of one seed are left out, and pairs that share fewer than two. Holm's correction is over a
  recipe's gaps, and separately over its pairs."""
  found = []
  for recipe in dict.fromkeys(gap.recipe for gap in gaps):
    paid = {
      gap.optimizer: dict(zip(gap.seeds, gap.losses[1] - gap.losses[0], strict=True))
      for gap in gaps
      if gap.recipe == recipe
    }
    alone = {name: [*of.values()] for name, of in paid.items() if len(of) > 1}
    of_none = compare_differences(alone) if alone else []
    found += [(recipe, one) for one in (*of_none, *compare_pairs(paid))]
  return found


def _pair(
  frame: pd.DataFrame, full: Tuning, under: Tuning, rate: float
) -> tuple[Gap | None, list[str]]:
  """(the gap, or None if no seed is done on both sides; sentences on seeds done on one side only).

  rate: that under the recipe."""
  sides = [_done(frame, full, full.learning_rate), _done(frame, under, rate)]
  seeds = tuple(int(seed) for seed in sides[0].index.intersection(sides[1].index))
  alone = sorted(set(sides[0].index) ^ set(sides[1].index))
  left_out = []
  if alone:
    left_out.append(
      f"{full.optimizer}, {under.recipe}: seeds {alone} are done on one side only, at learning "
      f"rate {full.learning_rate:g}" + ("" if rate == full.learning_rate else f" and {rate:g}")
    )
  if not seeds:
    return None, left_out
  losses, bits = (
    np.array([[final_metric(run, metric) for run in side[list(seeds)]] for side in sides])
    for metric in ("eval/loss", "eval/bits_per_byte")
  )
  rates = full.learning_rate, rate
  return Gap(full.optimizer, under.recipe, rates, seeds, losses, bits), left_out


def _done(frame: pd.DataFrame, t: Tuning, rate: float) -> pd.Series:
  """The finished runs of a sweep at a rate, by seed."""
  done = frame[
    np.isfinite(frame.loss)
    & (frame.optimizer == t.optimizer)
    & (frame.recipe == t.recipe)
    & (frame.rate == rate)
  ]
  return done.set_index("seed").sort_index().run
