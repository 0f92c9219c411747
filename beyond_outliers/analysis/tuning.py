"""Learning rates of a sweep: per rate a mean over seeds, and the rate whose mean is least."""

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

# What runs may differ in whose losses are set side by side. All else of a config they have in
# common, and so whatever is added to one.
MAY_DIFFER = (
  *config.MAY_CHANGE,  # decide no more than the order of float sums
  "seed",  # means are over seeds
  "optimizer",  # is compared; two runs of one differ in no more than the rate that is swept
  "quant",  # likewise: two runs of one recipe have it in common
  "tokens_per_parameter",  # what `steps`, which is compared, was derived from
  "eval.every",  # the losses in tables are those after the last step
  "average",  # training does not see it
  # Each seed may have a parent of its own; that runs have one, a recipe's share, and those that
  # name one folder, what they found in it.
  "warm_start",
  "data.validation",  # may name files, wherever they lie: the dataset's fingerprint tells
)
# Columns of `run_frame` that say how large a model is and how long it is trained: of one sweep one.
EXTENT = ("size", "shape", "batch_size", "steps")


@dataclasses.dataclass(frozen=True)
class Tuning:
  """One optimizer's sweep over learning rates. Losses are validation losses at the last step, in
  nats, means over seeds."""

  optimizer: str
  recipe: str
  losses: dict[float, float]  # by learning rate, ascending; infinite where a run did not finish
  best: tuple[runs_lib.Run, ...]  # the runs, one per seed, at the best rate
  unjudged: tuple[int, ...] = ()  # seeds that not all rates have, whose runs are in no mean

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
  def overrides(self) -> Json:
    return {"optimizer.learning_rate": self.learning_rate}


def tunings(runs: Sequence[runs_lib.Run]) -> list[Tuning]:
  """One `Tuning` per optimizer and recipe among the runs: by recipe, best first.

  A rate is judged by the seeds that all rates of its sweep have.
  Errors: ConfigError when a sweep's rates have no seed in common, or runs do not compare."""
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
  """What to say of seeds that not all rates of a sweep have."""
  return [
    f"{t.optimizer} ({t.recipe}): its rates are judged by the seeds that all of them have, without "
    f"{', '.join(map(str, t.unjudged))}"
    for t in tunings
    if t.unjudged
  ]


def study_rate(under: Tuning, full: Tuning | None) -> float:
  """Learning rate that a recipe's runs have in the study (arXiv 2509.23500, section 3): the best in
  full precision; where it was not run under the recipe, or there is none, the recipe's own best."""
  if full is None or full.learning_rate not in under.losses:
    return under.learning_rate
  return full.learning_rate


def run_frame(runs: Sequence[runs_lib.Run], *, but: Collection[str] = ()) -> pd.DataFrame:
  """One row per run: optimizer, recipe, rate, seed, loss (validation, after the last step; infinite
  if not done), size, shape (of the model, as SHAPE), batch_size, steps, run.

  but: config keys, or sections, that may differ beside MAY_DIFFER.
  Errors: ConfigError for runs that do not compare, or that are one run twice."""
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
  """What to say of each run that counts as infinite since it is not done, nor of status `but`."""
  counted = [run for run in runs if run.status["status"] not in ("done", *but)]
  return [f"{standing(run)}, so its loss counts as infinite" for run in counted]


def standing(run: runs_lib.Run) -> str:
  """In words how far a run has come."""
  status = run.status
  return f"{run.name}: {status['status']} at step {status['step']} of {run.config.steps}"


def check_comparable(runs: Sequence[runs_lib.Run], but: Collection[str] = ()) -> None:
  """Refusal of runs that cannot be compared.

  but: config keys, or sections, that may differ beside MAY_DIFFER.
  Errors: ConfigError when there are no runs, or two differ in data, in more of their configs than
    they may, in JAX's settings that decide numbers, or in one optimizer's or recipe's settings."""
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
  """What a run has in common with those it compares with: with all; with those of its optimizer;
  with those of its recipe; and with those that begin with the parameters of one workdir."""
  c = run.config
  flat = config.flatten(config.to_dict(c))
  with_all = {
    **{key: value for key, value in flat.items() if not _below(key, [*but, *MAY_DIFFER])},
    # Fingerprints; of the tokenizer, too, which the config may name by its file.
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
  if parent := run.manifest.get("warm_start"):  # not in manifests of earlier versions
    at = parent["workdir"]
    if not stores.is_address(at):  # a packed run names what lay beside it without the folder
      at = os.path.join(run.path.parent, at)
    found[f"warm_start {at}"] = {f"warm_start = {at!r}: parameters": parent["parameters"]}
  return found


def _differences(
  one: Mapping[str, object], other: Mapping[str, object]
) -> Iterator[tuple[str, object, object]]:
  """(key, value, other value) where two flat configs differ in more than the rate that is swept."""
  rates = one.get("optimizer.learning_rate"), other.get("optimizer.learning_rate")
  for key in sorted(one.keys() | other.keys()):
    values = one.get(key), other.get(key)
    # Parameter groups without a rate of their own have the one that is swept.
    if values[0] != values[1] and not (key.endswith(".learning_rate") and values == rates):
      yield key, *values


def _below(key: str, sections: Collection[str]) -> bool:
  return any(key == section or key.startswith(section + ".") for section in sections)
