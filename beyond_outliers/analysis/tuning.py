"""The study's protocol as code: which learning rate of a sweep is taken, and how optimizers come to
one loss."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from etils import epath

from beyond_outliers import config, quant
from beyond_outliers import runs as runs_lib
from beyond_outliers.errors import ConfigError

FULL_PRECISION = "none"

# What runs must agree on before their losses are set side by side, beside their data and each
# optimizer's own settings.
COMPARED = (
  "size",
  "steps",
  "batch_size",
  "context",
  "warm_start",
  "model",
  "schedule",
  "data.mask_documents",
  "eval.documents",
)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """One optimizer's sweep over learning rates. Losses are validation losses at the last step, in
  nats, means over seeds."""

  optimizer: str
  recipe: str
  losses: dict[float, float]  # by learning rate, ascending; infinite where a run did not finish
  best: tuple[runs_lib.Run, ...]  # the runs, one a seed, at the best rate

  @property
  def learning_rate(self) -> float:
    return min(self.losses, key=self.losses.__getitem__)

  @property
  def loss(self) -> float:
    return self.losses[self.learning_rate]

  @property
  def at_the_edge(self) -> bool:
    """Whether a still better rate may lie outside the grid."""
    return self.learning_rate in (min(self.losses), max(self.losses))

  @property
  def overrides(self) -> dict[str, Any]:
    return {"optimizer.learning_rate": self.learning_rate}


def final(run: runs_lib.Run, metric: str) -> float:
  """A metric's value after the last step; infinite for a run that is not done, or where it was not
  finite."""
  values = (
    run.metrics().get(metric, pd.Series(dtype=float)) if run.status["status"] == "done" else {}
  )
  value = float(values.get(run.config.steps, math.inf))
  return value if math.isfinite(value) else math.inf


def table(runs: Sequence[runs_lib.Run], *, but: Collection[str] = ()) -> pd.DataFrame:
  """One row a run: optimizer, recipe, rate, seed, loss (validation, after the last step; infinite
  if not done), steps, run.

  but: what of COMPARED may differ. Errors: ConfigError for runs that do not compare, or that are
    one run twice."""
  check_comparable(runs, but)
  rows = [
    {
      "optimizer": run.config.optimizer.name,
      "recipe": quant.recipes.name_of(run.config.quant),
      "rate": run.config.optimizer.learning_rate,
      "seed": run.config.seed,
      "loss": final(run, "eval/loss"),
      "steps": run.config.steps,
      "run": run,
    }
    for run in runs
  ]
  frame = pd.DataFrame(rows)
  for _, same in frame.groupby(["optimizer", "recipe", "rate", "seed", "steps"]):
    if len(same) > 1:
      raise ConfigError(
        f"{same.run.iloc[0].path} and {same.run.iloc[1].path} are of one optimizer, recipe, "
        "learning rate, seed "
        "and length: leave one out"
      )
  return frame


def check_comparable(runs: Sequence[runs_lib.Run], but: Collection[str] = ()) -> None:
  """Errors: ConfigError when there are no runs, or two differ in data, in what COMPARED lists, or
  in one optimizer's settings."""
  if not runs:
    raise ConfigError("no runs: give the folder that holds their workdirs")
  alike: dict[str, tuple[runs_lib.Run, Mapping[str, Any]]] = {}
  for run in runs:
    flat = config.flatten(config.to_dict(run.config))
    keys = {
      key
      for key in flat
      if _below(key, set(COMPARED) - set(but)) and not _below(key, config.MAY_CHANGE)
    }
    compared = {
      "data.fingerprint": run.manifest["data"]["fingerprint"],
      **{key: flat[key] for key in keys},
    }
    settings = {key: value for key, value in flat.items() if _below(key, ["optimizer"])}
    for group, values in (("", compared), (run.config.optimizer.name, settings)):
      first, expected = alike.setdefault(group, (run, values))
      for key in sorted(expected.keys() | values.keys()):
        one, other = expected.get(key), values.get(key)
        # Parameter groups without a rate of their own have the one that is swept.
        rates = expected.get("optimizer.learning_rate"), values.get("optimizer.learning_rate")
        if one != other and not (key.endswith(".learning_rate") and (one, other) == rates):
          raise ConfigError(
            f"{key}: {one!r} in {first.path}, {other!r} in {run.path}: these do not compare; "
            "report on them "
            "apart"
          )


def _below(key: str, sections: Collection[str]) -> bool:
  return any(key == section or key.startswith(section + ".") for section in sections)


def tuning(runs: Sequence[runs_lib.Run]) -> list[Tuning]:
  """A `Tuning` for every optimizer and recipe among the runs, those of a recipe together, best
  first.

  A rate is judged by the seeds that all rates of its sweep have.
  Errors: ConfigError when a sweep's rates have no seed in common, or runs do not compare."""
  return _tunings(table(runs))


def _tunings(frame: pd.DataFrame) -> list[Tuning]:
  found = []
  for (recipe, name), sweep in frame.groupby(["recipe", "optimizer"]):
    common = set.intersection(*(set(group.seed) for _, group in sweep.groupby("rate")))
    if not common:
      raise ConfigError(
        f"{name}: the rates {sorted(set(sweep.rate))} have no seed in common; run every rate with "
        "one seed"
      )
    judged = sweep[sweep.seed.isin(common)]
    losses = {
      float(rate): float(judged.loss[judged.rate == rate].mean())
      for rate in sorted(set(judged.rate))
    }
    best = judged[judged.rate == min(losses, key=losses.__getitem__)].sort_values("seed")
    found.append(Tuning(str(name), str(recipe), losses, tuple(best.run)))
  return sorted(found, key=lambda t: (t.recipe != FULL_PRECISION, t.recipe, t.loss))


class Point(NamedTuple):
  step: int
  loss: float


@dataclasses.dataclass(frozen=True)
class Landing:
  """How one optimizer comes to the common loss. Losses are validation losses in nats, means over
  seeds."""

  optimizer: str
  learning_rate: float
  best: Point  # the last step of the full length
  steps: int  # the length of a run that should end at the common loss
  ending: Point  # of the runs there are, of any length, the end that is nearest to it
  evaluation: Point  # of the full-length runs' evaluations, the nearest
  checkpoint: Point | None  # of the checkpoints that all seeds of them still have

  @property
  def overrides(self) -> dict[str, Any]:
    return {"optimizer.learning_rate": self.learning_rate, "steps": self.steps}


def common_loss(runs: Sequence[runs_lib.Run]) -> tuple[float, list[Landing]]:
  """(CL, one `Landing` an optimizer): CL is the worst of the optimizers' best full-precision losses
  at full length.

  How models land on CL the paper (arXiv 2509.23500) leaves open. Here each optimizer is trained
  again at its tuned rate for fewer steps, with a schedule of its own: a model taken from the middle
  of a run would be the only one without its cool-down. The number of steps comes from what is known
  of losses at the end of runs of other lengths, linear in the logarithm of the steps. While there
  is one length only, a run of n steps is taken to end as far below the full run's evaluation at n,
  before its cool-down, as the full run ended below the line through these evaluations. Once the
  re-runs are among `runs`, their ends replace that guess, so that the same two commands, report and
  launch, close in on CL; |ending.loss - loss| says how near it is. All seeds of an optimizer get
  one number of steps: landing each by itself would take out part of the variance between them. A
  checkpoint's loss is that of the evaluation at its step, or between two evaluations linear in the
  step.
  Errors: ConfigError as `tuning`; fewer than two evaluations before the cool-down; losses that do
    not fall with the steps."""
  frame = table(runs, but=("steps",))
  frame = frame[frame.recipe == FULL_PRECISION]
  if frame.empty:
    raise ConfigError(
      "the common loss is of runs in full precision (quant.recipe = 'none'), and there are none; "
      "give some"
    )
  length = int(frame.steps.max())
  tunings = _tunings(frame[frame.steps == length])
  target = max(t.loss for t in tunings)
  if not math.isfinite(target):
    raise ConfigError(
      f"{[t.optimizer for t in tunings if not math.isfinite(t.loss)]}: no run of {length} steps is "
      "done; finish "
      "one, or leave these optimizers out"
    )
  landings = []
  for t in tunings:
    seeds = {run.config.seed for run in t.best}
    own = frame[
      (frame.optimizer == t.optimizer) & (frame.rate == t.learning_rate) & frame.seed.isin(seeds)
    ]
    whole = [
      group
      for _, group in own.groupby("steps")
      if set(group.seed) == seeds and np.isfinite(group.loss).all()
    ]
    endings = [Point(int(group.steps.iloc[0]), float(group.loss.mean())) for group in whole]
    curve = (
      pd.concat([run.metrics()["eval/loss"].dropna() for run in t.best], axis=1)
      .dropna()
      .mean(axis=1)
    )
    evaluations = [Point(int(step), float(loss)) for step, loss in curve.items()]  # pyrefly: ignore[bad-argument-type]
    saved = set.intersection(*(set(run.steps) for run in t.best))
    checkpoints = [Point(step, float(np.interp(step, curve.index, curve))) for step in saved]
    near = lambda points: min(points, key=lambda point: abs(point.loss - target))
    known = (
      endings
      if len(endings) > 1
      else _expected_endings(evaluations, t.best[0].config.schedule, t.optimizer)
    )
    steps = length if t.loss == target else _steps_to(target, known, t.optimizer)
    landings.append(
      Landing(
        t.optimizer,
        t.learning_rate,
        Point(length, t.loss),
        steps,
        near(endings),
        near(evaluations),
        near(checkpoints) if checkpoints else None,
      )
    )
  return target, landings


def _expected_endings(
  evaluations: Sequence[Point], schedule: config.Schedule, name: str
) -> list[Point]:
  """Where runs would end that are as long as a run was when it was evaluated, from how far its own
  cool-down took it."""
  length, final = evaluations[-1]
  flat = [
    p for p in evaluations if schedule.warmup * length <= p.step <= (1 - schedule.cooldown) * length
  ]
  if len(flat) < 2:
    raise ConfigError(
      f"{name}: {len(flat)} evaluations between warm-up and cool-down of {length} steps, two are "
      "needed to "
      "estimate a shorter run: train with a smaller eval.every"
    )
  slope = (flat[-1].loss - flat[-2].loss) / math.log(flat[-1].step / flat[-2].step)
  gain = flat[-1].loss + slope * math.log(length / flat[-1].step) - final
  return [*(Point(p.step, p.loss - gain) for p in flat), Point(length, final)]


def _steps_to(target: float, points: Sequence[Point], name: str) -> int:
  """Where losses cross the target, linear in log steps between two points, or beyond them from the
  two that are nearest."""
  after = next((i for i, p in enumerate(points) if i > 0 and p.loss <= target), len(points) - 1)
  (first, high), (second, low) = points[after - 1], points[after]
  if low >= high:
    raise ConfigError(
      f"{name}: the loss does not fall between {first} steps ({high:.4f}) and {second} "
      f"({low:.4f}): no estimate; "
      "add a run of another length"
    )
  return max(1, round(first * (second / first) ** ((high - target) / (high - low))))


def write_overrides(path: Any, size: str, found: Sequence[Tuning | Landing]) -> None:
  """What was found, as a file that `launch.local --overrides` reads: {size, overrides: {optimizer:
  {config key: value}}}.

  Errors: ConfigError when an optimizer comes twice."""
  names = [one.optimizer for one in found]
  if len(set(names)) < len(names):
    raise ConfigError(f"{names}: one entry an optimizer; give those of one recipe")
  text = json.dumps(
    {"size": size, "overrides": {one.optimizer: one.overrides for one in found}}, indent=1
  )
  epath.Path(path).write_text(text + "\n")
