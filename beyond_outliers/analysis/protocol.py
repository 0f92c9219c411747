"""The study's protocol as code: which learning rate of a sweep is taken."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pandas as pd

from beyond_outliers import runs as runs_lib


@dataclasses.dataclass(frozen=True)
class Tuning:
  """One optimizer's sweep over learning rates. Losses are validation losses at the last step, in nats, means over seeds."""
  optimizer: str
  losses: dict[float, float]                # by learning rate, ascending; infinite where a run did not finish
  best: tuple[runs_lib.Run, ...]            # the runs, one a seed, at the best rate

  @property
  def learning_rate(self) -> float:
    return min(self.losses, key=self.losses.__getitem__)

  @property
  def at_the_edge(self) -> bool:
    """Whether a still better rate may lie outside the grid."""
    return self.learning_rate in (min(self.losses), max(self.losses))


def last(run: runs_lib.Run, metric: str) -> float:
  """A metric's last value; infinite for a run that is not done."""
  if run.status["status"] != "done":
    return math.inf
  metrics = run.metrics()
  return float(metrics[metric].dropna().iloc[-1]) if metric in metrics else 0.0


def tuning(runs: Sequence[runs_lib.Run]) -> list[Tuning]:
  """A `Tuning` for every optimizer among the runs of a sweep. A rate is judged by the seeds that all rates of its optimizer have.

  Errors: ValueError when an optimizer's rates have no seed in common."""
  table = pd.DataFrame([{"optimizer": run.config.optimizer.name, "rate": run.config.optimizer.learning_rate,
                         "seed": run.config.seed, "loss": last(run, "eval/loss"), "run": run} for run in runs])
  found = []
  for name, of_optimizer in table.groupby("optimizer"):
    common = set.intersection(*(set(group.seed) for _, group in of_optimizer.groupby("rate")))
    if not common:
      raise ValueError(f"{name}: the rates {sorted(set(of_optimizer.rate))} have no seed in common; run every rate with one seed")
    judged = of_optimizer[of_optimizer.seed.isin(common)]
    losses = {float(rate): float(judged.loss[judged.rate == rate].mean()) for rate in sorted(set(judged.rate))}
    best = judged[judged.rate == min(losses, key=losses.__getitem__)].sort_values("seed")
    found.append(Tuning(str(name), losses, tuple(best.run)))
  return sorted(found, key=lambda t: t.losses[t.learning_rate])
