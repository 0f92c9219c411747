"""The common loss: one validation loss that every optimizer reaches, and the lengths of the runs
that end at it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from beyond_outliers import config
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis.tuning import FULL_PRECISION, Tuning, run_frame, tunings_of
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import results
from beyond_outliers.types import Json


class Point(NamedTuple):
  """A loss at a step."""

  step: int
  loss: float


@dataclasses.dataclass(frozen=True)
class Landing:
  """One optimizer's ways to the common loss.

  Losses are validation losses in nats, means over seeds. Checkpoints are those that the runs of
  full length have for all seeds, or had when they were evaluated."""

  optimizer: str
  learning_rate: float
  best: Point  # the last step of the full length
  steps: int  # the length of a run that should end at the common loss
  ending: Point  # the nearest end of the existing runs, of any length
  evaluation: Point  # the nearest evaluation of the full-length runs
  checkpoint: Point | None  # their nearest checkpoint
  crossing: Point | None  # their first checkpoint at or below the common loss
  runs: tuple[runs_lib.Run, ...]  # of full length, one per seed

  @property
  def overrides(self) -> Json:
    return {"optimizer.learning_rate": self.learning_rate, "steps": self.steps}


def common_loss(runs: Sequence[runs_lib.Run]) -> tuple[float, list[Landing]]:
  """The common loss CL and each optimizer's ways to it: (CL, [Landing, ...]).

  CL is the worst of the optimizers' best full-precision losses at full length.

  The paper (arXiv 2509.23500) does not say how models land on CL. Here each optimizer is trained
  again at its tuned rate for fewer steps, with a schedule of its own: a model taken from the middle
  of a run would be the only one without a cool-down. The number of steps is interpolated between
  final losses of runs of other lengths, linearly in the logarithm of the steps. As long as all runs
  have one length, a run of n steps is assumed to end as far below the full run's evaluation at n,
  before its cool-down, as the full run ended below the line through these evaluations. Once the
  re-runs are among `runs`, their ends replace that guess, so that repeating the same two commands,
  report and launch, converges to CL; |ending.loss - CL| tells how near it is. All seeds of an
  optimizer get the same number of steps: landing each separately would hide part of their variance.

  A checkpoint's loss is that of the evaluation at its step, or interpolated between two, linearly
  in the step; checkpoints before the first evaluation have none and are left out. The authors' code
  instead takes the first checkpoint of the full-length run whose loss is below CL, which is
  `crossing`; there a run's best loss is the least of many estimates, each on few fresh tokens, and
  so biased low. Here all losses are of one validation set, and the best loss is the last one.
  landings.py compares what quantization costs at each landing.
  Errors: ConfigError as `tuning.tunings`; for an optimizer without a run of full length; fewer than
    two evaluations before the cool-down; losses that do not fall with the steps."""
  frame = run_frame(runs, but=("steps",))
  frame = frame[frame.recipe == FULL_PRECISION]
  if frame.empty:
    raise ConfigError(
      "the common loss needs runs in full precision (quant.recipe = 'none'), and there are none; "
      "give some"
    )
  length = int(frame.steps.max())
  if shorter := sorted(set(frame.optimizer) - set(frame.optimizer[frame.steps == length])):
    raise ConfigError(
      f"{', '.join(shorter)}: no run of {length} steps, the longest here; train one, or leave out "
      f"{'these' if len(shorter) > 1 else 'this optimizer'}, or the longer runs"
    )
  tunings = tunings_of(frame[frame.steps == length])
  target = max(t.loss for t in tunings)
  if not math.isfinite(target):
    raise ConfigError(
      f"{[t.optimizer for t in tunings if not math.isfinite(t.loss)]}: no run of {length} steps is "
      "done; finish one, or leave these optimizers out"
    )
  return target, [_landing(t, frame, length, target) for t in tunings]


def _landing(t: Tuning, frame: pd.DataFrame, length: int, target: float) -> Landing:
  endings, evaluations = _endings(t, frame), _evaluations(t)
  checkpoints = _checkpoints(t, evaluations)
  known = (
    endings
    if len(endings) > 1
    else _expected_endings(evaluations, t.best[0].config.schedule, t.optimizer)
  )
  return Landing(
    optimizer=t.optimizer,
    learning_rate=t.learning_rate,
    best=Point(length, t.loss),
    steps=length if t.loss == target else _steps_to(target, known, t.optimizer),
    ending=_nearest(endings, target),
    evaluation=_nearest(evaluations, target),
    checkpoint=_nearest(checkpoints, target) if checkpoints else None,
    crossing=_crossing(checkpoints, target),
    runs=t.best,
  )


def _nearest(points: Iterable[Point], target: float) -> Point:
  return min(points, key=lambda point: abs(point.loss - target))


def _crossing(points: Iterable[Point], target: float) -> Point | None:
  # The optimizer that sets CL reaches it only up to rounding, by the order of summation.
  below = (p for p in points if p.loss <= target or math.isclose(p.loss, target))
  return min(below, default=None)


def _endings(t: Tuning, frame: pd.DataFrame) -> list[Point]:
  """Final losses of the runs at the tuned rate, for each length that all of its seeds finished."""
  seeds = {run.config.seed for run in t.best}
  own = frame[
    (frame.optimizer == t.optimizer) & (frame.rate == t.learning_rate) & frame.seed.isin(seeds)
  ]
  return [
    Point(int(group.steps.iloc[0]), float(group.loss.mean()))
    for _, group in own.groupby("steps")
    if set(group.seed) == seeds and np.isfinite(group.loss).all()
  ]


def _evaluations(t: Tuning) -> list[Point]:
  """Losses of the best runs, at the steps at which all of them were evaluated."""
  curves = pd.concat([run.metrics()["eval/loss"].dropna() for run in t.best], axis=1).dropna()
  steps = curves.index.to_numpy(int)
  return [
    Point(int(step), float(loss)) for step, loss in zip(steps, curves.mean(axis=1), strict=True)
  ]


def _checkpoints(t: Tuning, evaluations: Sequence[Point]) -> list[Point]:
  """Checkpoints that all of the best runs have, or had when they were evaluated, by their cells;
  without those before the first evaluation, whose loss is not known."""
  saved = set.intersection(*(set(run.steps) | _evaluated(run) for run in t.best))
  steps, losses = zip(*evaluations, strict=True)
  return [Point(step, float(np.interp(step, steps, losses))) for step in saved if step >= steps[0]]


def _evaluated(run: runs_lib.Run) -> set[int]:
  return {
    cell["step"] for cell in results.of_run(run, results.ResultStore(run.path / "eval").cells())
  }


def _expected_endings(
  evaluations: Sequence[Point], schedule: config.Schedule, name: str
) -> list[Point]:
  """Estimated losses of runs that end at the evaluated steps, from the real cool-down's gain."""
  length, final = evaluations[-1]
  flat = [
    p for p in evaluations if schedule.warmup * length <= p.step <= (1 - schedule.cooldown) * length
  ]
  if len(flat) < 2:
    raise ConfigError(
      f"{name}: {len(flat)} evaluations between warm-up and cool-down of {length} steps, and two "
      "are needed to estimate a shorter run; train with a smaller eval.every"
    )
  slope = (flat[-1].loss - flat[-2].loss) / math.log(flat[-1].step / flat[-2].step)
  gain = flat[-1].loss + slope * math.log(length / flat[-1].step) - final
  return [*(Point(p.step, p.loss - gain) for p in flat), Point(length, final)]


def _steps_to(target: float, points: Sequence[Point], name: str) -> int:
  """The step at which losses cross the target: linear in log steps between two points, or
  extrapolated from the nearest two."""
  after = next((i for i, p in enumerate(points) if i > 0 and p.loss <= target), len(points) - 1)
  (first, high), (second, low) = points[after - 1], points[after]
  if low >= high:
    raise ConfigError(
      f"{name}: the loss does not fall between {first} steps ({high:.4f}) and {second} "
      f"({low:.4f}): no estimate; add a run of another length"
    )
  return max(1, round(first * (second / first) ** ((high - target) / (high - low))))
