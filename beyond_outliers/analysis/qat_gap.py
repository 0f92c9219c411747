"""What training under a recipe costs: the validation loss it ends at beyond that of the same run in
full precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import tuning


class Estimate(NamedTuple):
  mean: float
  stderr: float  # of the mean; NaN for one value


def estimate(values: np.ndarray) -> Estimate:
  n = len(values)
  return Estimate(
    float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
  )


@dataclasses.dataclass(frozen=True)
class Gap:
  """One optimizer under one recipe and in full precision, paired by seed: equal initial parameters,
  equal batches."""

  optimizer: str
  recipe: str
  rates: tuple[float, float]  # learning rates in full precision and under the recipe
  seeds: tuple[int, ...]  # that both have
  losses: (
    np.ndarray
  )  # [2, seeds]: validation losses in nats, in full precision and under the recipe
  bits_per_byte: np.ndarray  # [2, seeds]; infinite where a dataset does not know its bytes

  @property
  def loss(self) -> Estimate:
    """Of the differences, in nats: what seeds have in common falls out of its standard error."""
    return estimate(self.losses[1] - self.losses[0])

  @property
  def bits(self) -> Estimate:
    return estimate(self.bits_per_byte[1] - self.bits_per_byte[0])

  @property
  def percent(self) -> Estimate:
    """Of the loss in full precision."""
    return estimate(100 * (self.losses[1] - self.losses[0]) / self.losses[0])


def gaps(runs: Sequence[runs_lib.Run]) -> tuple[list[Gap], list[str]]:
  """(a `Gap` for every optimizer and recipe, those of a recipe together, smallest first; what had
  to be left out, in words).

  As in the study (arXiv 2509.23500, section 3) both sides have the learning rate that is best in
  full precision; where a recipe was not trained at that rate, the best it was trained at. Errors:
  ConfigError as protocol.tuning."""
  frame = tuning.table(runs)
  left_out = [
    f"{run.path}: {run.status['status']} at step {run.status['step']} of {run.config.steps}"
    for run in frame.run
    if run.status["status"] != "done"
  ]
  # A rate is chosen by the seeds common to all rates; the gap has all seeds there are at that rate.
  tunings = {(t.recipe, t.optimizer): t for t in tuning.tuning(runs)}
  done = frame[np.isfinite(frame.loss)].set_index("seed").sort_index()
  found = []
  for recipe, name in sorted(set(zip(frame.recipe, frame.optimizer, strict=True))):
    full, under = tunings.get((tuning.FULL_PRECISION, name)), tunings[recipe, name]
    if recipe == tuning.FULL_PRECISION:
      if not any((other, name) in tunings for other in set(frame.recipe) - {recipe}):
        left_out.append(f"{name}: no run under a recipe")
      continue
    if full is None or (len(full.losses) > 1 and not math.isfinite(full.loss)):
      left_out.append(
        f"{name}: no {'run' if full is None else 'learning rate with all seeds done'} in full "
        "precision"
      )
      continue
    of = lambda recipe, rate, name=name: done[
      (done.optimizer == name) & (done.recipe == recipe) & (done.rate == rate)
    ]
    plain = of(tuning.FULL_PRECISION, full.learning_rate)
    rate = full.learning_rate if full.learning_rate in under.losses else under.learning_rate
    quantized = of(recipe, rate)
    seeds = tuple(int(seed) for seed in plain.index.intersection(quantized.index))
    alone = sorted(set(plain.index) ^ set(quantized.index))
    if alone:
      left_out.append(
        f"{name}, {recipe}: seeds {alone} are done on one side only, at learning rate "
        f"{full.learning_rate:g}" + ("" if rate == full.learning_rate else f" and {rate:g}")
      )
    if seeds:
      sides = [side.run[list(seeds)] for side in (plain, quantized)]
      losses, bits = (
        np.array([[tuning.final(run, metric) for run in side] for side in sides])
        for metric in ("eval/loss", "eval/bits_per_byte")
      )
      found.append(Gap(name, recipe, (full.learning_rate, rate), seeds, losses, bits))
  return sorted(found, key=lambda gap: (gap.recipe, gap.loss.mean)), left_out
