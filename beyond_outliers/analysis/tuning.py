"""Learning rates of a sweep: the mean loss over seeds at each rate, and the rate of the least."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import pandas as pd

from beyond_outliers import config, quant, stores
from beyond_outliers import runs as runs_lib
from beyond_outliers.config.sizes import SHAPE
from beyond_outliers.errors import ConfigError
from beyond_outliers.mesh import jax_settings
from beyond_outliers.types import Json

FULL_PRECISION = "none"

# Config keys in which runs may differ whose losses are compared. In all others they must agree, and
# so in any that is added to the configuration.
MAY_DIFFER = (
  *config.MAY_CHANGE,  # affect at most the order of float sums
  "seed",  # means are over seeds
  "optimizer",  # is compared; `in_common` has one optimizer's runs differ in the swept rate alone
  "quant",  # likewise, `in_common` has runs under one recipe agree in it
  "tokens_per_parameter",  # `steps`, which was derived from it, is compared
  "eval.every",  # the losses in tables are those after the last step
  "average",  # does not affect training
  # Each seed may have its own parent. `in_common` has runs under a recipe agree on having one, and
  # runs that name the same folder on the parameters found there.
  "warm_start",
  "data.validation",  # may name files anywhere; the dataset's fingerprint is compared
)
# Columns of `run_frame` for a model's size and training length: the same throughout a sweep.
EXTENT = ("size", "shape", "batch_size", "steps")


@dataclasses.dataclass(frozen=True)
class Tuning:
  """One optimizer's sweep over learning rates. Losses are validation losses at the last step, in
  nats, means over seeds."""

  optimizer: str
  recipe: str
  losses: dict[float, float]  # by learning rate, ascending; infinite if a run did not finish
  best: tuple[runs_lib.Run, ...]  # the runs, one per seed, at the best rate
  unjudged: tuple[int, ...] = ()  # seeds missing at some rate, whose runs are in no mean

  @property
  def learning_rate(self) -> float:
    return min(self.losses, key=self.losses.__getitem__)

  @property
  def loss(self) -> float:
    return self.losses[self.learning_rate]

  @property
  def at_the_edge(self) -> bool:
    """Whether a better rate may lie outside the grid."""
    return self.learning_rate in (min(self.losses), max(self.losses))

  @property
  def overrides(self) -> Json:
    return {"optimizer.learning_rate": self.learning_rate}


def tunings(runs: Sequence[runs_lib.Run]) -> list[Tuning]:
  """One `Tuning` per optimizer and recipe among the runs: by recipe, best first.

  A rate is judged by the seeds that all rates of its sweep have.
  Errors: ConfigError if a sweep's rates have no seed in common, or runs are not comparable."""
  return tunings_of(run_frame(runs))


def tunings_of(frame: pd.DataFrame) -> list[Tuning]:
  """`tunings` of the rows of a `run_frame`."""
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
    others = tuple(sorted({int(seed) for seed in sweep.seed} - common))
    found.append(Tuning(str(name), str(recipe), losses, tuple(best.run), others))
  return sorted(found, key=lambda t: (t.recipe != FULL_PRECISION, t.recipe, t.loss))


def judged_without(tunings: Iterable[Tuning]) -> list[str]:
  """Sentences on seeds that are missing at some rate of a sweep, one for equal sets of seeds."""
  sweeps: dict[str, list[str]] = {}
  for t in tunings:
    if t.unjudged:
      seeds = ", ".join(map(str, t.unjudged))
      sweeps.setdefault(seeds, []).append(f"{t.optimizer} ({t.recipe})")
  return [
    f"rates are compared by the seeds that all of a sweep's have, without {seeds}: "
    + ", ".join(of_seeds)
    for seeds, of_seeds in sweeps.items()
  ]


def study_rate(under: Tuning, full: Tuning | None) -> float:
  """Learning rate for a recipe as in the study (arXiv 2509.23500, section 3): the best in full
  precision; if there is none or it was not run under the recipe, the recipe's own best."""
  if full is None or full.learning_rate not in under.losses:
    return under.learning_rate
  return full.learning_rate


def run_frame(runs: Sequence[runs_lib.Run], *, but: Collection[str] = ()) -> pd.DataFrame:
  """One row per run: optimizer, recipe, rate, seed, loss (validation, after the last step; infinite
  if not done), size, shape (of the model, as SHAPE), batch_size, steps, run.

  but: config keys, or sections, that may differ besides MAY_DIFFER.
  Errors: ConfigError for runs that are not comparable, or are there twice."""
  check_comparable(runs, but)
  rows = [
    {
      "optimizer": run.config.optimizer.name,
      "recipe": quant.recipes.name_of(run.config.quant),
      "rate": run.config.optimizer.learning_rate,
      "seed": run.config.seed,
      "loss": final_metric(run, "eval/loss"),
      "size": run.config.size,
      "shape": tuple(getattr(run.config.model, name) for name in SHAPE),
      "batch_size": run.config.batch_size,
      "steps": run.config.steps,
      "run": run,
    }
    for run in runs
  ]
  frame = pd.DataFrame(rows)
  for _, same in frame.groupby(["optimizer", "recipe", "rate", "seed", *EXTENT]):
    if len(same) > 1:
      raise ConfigError(
        f"{same.run.iloc[0].name} and {same.run.iloc[1].name} have the same optimizer, recipe, "
        "learning rate, seed and length; leave one out"
      )
  return frame


def final_metric(run: runs_lib.Run, metric: str) -> float:
  """A metric's value after the last step; infinite for an unfinished run or a non-finite value."""
  if run.status["status"] != "done":
    return math.inf
  values = run.metrics().get(metric, pd.Series(dtype=float))
  value = float(values.get(run.config.steps, math.inf))
  return value if math.isfinite(value) else math.inf


def not_done(runs: Sequence[runs_lib.Run], *but: str) -> list[str]:
  """A sentence for each run that is not done, and so counts as infinite. but: statuses to skip."""
  counted = [run for run in runs if run.status["status"] not in ("done", *but)]
  return [f"{standing(run)}, so its loss counts as infinite" for run in counted]


def standing(run: runs_lib.Run) -> str:
  """A sentence on a run's status and how far it has come."""
  status = run.status
  return f"{run.name}: {status['status']} at step {status['step']} of {run.config.steps}"


def check_comparable(runs: Sequence[runs_lib.Run], but: Collection[str] = ()) -> None:
  """Refuses runs that cannot be compared.

  but: config keys, or sections, that may differ besides MAY_DIFFER.
  Errors: ConfigError if there are no runs, or if two differ in data, in more of their configs than
    they may, in JAX settings that affect numbers, or in one optimizer's or recipe's settings."""
  if not runs:
    raise ConfigError("no runs: give the folder that holds their workdirs")
  alike: dict[str, tuple[runs_lib.Run, Json]] = {}
  for run in runs:
    for group, values in in_common(run, but).items():
      first, expected = alike.setdefault(group, (run, values))
      for key, one, other in _differences(expected, values):
        raise ConfigError(
          f"{key}: {one!r} in {first.name}, {other!r} in {run.name}: such runs cannot be compared; "
          "report on them separately"
        )


def in_common(run: runs_lib.Run, but: Collection[str] = ()) -> dict[str, Json]:
  """{group: settings in which all runs of that group must agree}. A run's groups are all runs (""),
  those of its optimizer, those of its recipe, and those that start from the same workdir."""
  c = run.config
  flat = config.flatten(config.to_dict(c))
  with_all = {
    **{key: value for key, value in flat.items() if not _below(key, [*but, *MAY_DIFFER])},
    # Fingerprints of the data and of the tokenizer, which the config may name by a file.
    **{f"data.{name}": run.trained_on[name] for name in ("fingerprint", "tokenizer")},
    **jax_settings.changed_in(run.manifest),
  }
  own = {"optimizer": c.optimizer.name, "quant": quant.recipes.name_of(c.quant)}
  found = {"": with_all} | {
    f"{section} {name}": {key: value for key, value in flat.items() if _below(key, [section])}
    for section, name in own.items()
  }
  of_recipe = found[f"quant {own['quant']}"]
  of_recipe["warm_start"] = "a run" if c.warm_start else ""
  if quant.recipes.from_config(c.quant).sees_batches:
    of_recipe["micro_batches"] = c.micro_batches
  if parent := run.manifest.get("warm_start"):  # missing from manifests of earlier versions
    at = parent["workdir"]
    if not stores.is_address(at):  # packed runs name their neighbours without the folder
      at = os.path.join(run.path.parent, at)
    found[f"warm_start {at}"] = {f"warm_start = {at!r}: parameters": parent["parameters"]}
  return found


def _differences(
  one: Mapping[str, object], other: Mapping[str, object]
) -> Iterator[tuple[str, object, object]]:
  """(key, value, other value) where two flat configs differ in more than the swept rate."""
  rates = one.get("optimizer.learning_rate"), other.get("optimizer.learning_rate")
  for key in sorted(one.keys() | other.keys()):
    values = one.get(key), other.get(key)
    # Parameter groups without a rate of their own have the swept one.
    if values[0] != values[1] and not (key.endswith(".learning_rate") and values == rates):
      yield key, *values


def _below(key: str, sections: Collection[str]) -> bool:
  return any(key == section or key.startswith(section + ".") for section in sections)
