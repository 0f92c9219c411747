"""What quantization costs optimizers at the common loss, by how their models reached it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers import config
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import ptq_degradation
from beyond_outliers.analysis.along_training import schedule_position
from beyond_outliers.analysis.common_loss import Landing, common_loss
from beyond_outliers.analysis.statistics import estimate, paired_difference
from beyond_outliers.analysis.tuning import FULL_PRECISION, run_frame
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.types import PathLike

# How a model reaches the common loss: trained again for fewer steps, with its own cool-down; the
# nearest checkpoint of the full-length run; its first checkpoint below, as in the authors' code.
WAYS = ("re-run", "nearest", "crossing")
DEFAULT = pd.DataFrame({"recipe": ["rtn_w4a4"], "method": ["rtn"]})  # the study's
PLACE = ["way", "optimizer", "seed", "run", "step", "fraction", "rate", "off"]


@dataclasses.dataclass(frozen=True)
class LandingComparison:
  """What quantization costs at each landing. `way` is one of WAYS.

  values: one row per recipe, method, way, optimizer and seed: run, step, fraction and rate (the
    position in its run's schedule, by `along_training.schedule_position`), off (the mean loss there
    less the common loss), full_precision_loss (of the cell), value (the metric).
  means: one row per (recipe, method, way, optimizer), over seeds: value, value_stderr, seeds, and
    place, 1 where least is lost; step, fraction, rate, off.
  differences: one row per (recipe, method, optimizer, way, other): value, that of `other` less that
    of `way`, paired by seed, value_stderr, p of the paired t test, seeds.
  orders: one row per (recipe, method, way, other): optimizers, the number that has both; changes,
    whether their order changes; exchanged, the pairs that change places.
  missing: sentences on missing runs, checkpoints and cells, and the commands that make them."""

  loss: float  # the common loss, nats
  metric: str
  values: pd.DataFrame
  means: pd.DataFrame
  differences: pd.DataFrame
  orders: pd.DataFrame
  missing: list[str]


def compare_landings(
  runs: Sequence[runs_lib.Run],
  metric: str = "loss_difference",
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> LandingComparison:
  """What quantization costs at the common loss, by optimizer and by the way it got there.

  The order of optimizers is the study's result (arXiv 2509.23500). Where it changes with the way in
  which they reach one loss, it is as much an order of positions in the schedule as of optimizers:
  quantization error grows as the rate decays (arXiv 2510.06213).
  metric, settings, folders: see `tables.degradation_table` and `ptq_degradation.degradation_cells`;
    metric may also be `relative`, the loss over that in full precision, less 1.
  Errors: ConfigError as `common_loss`, for a metric that no cell has, and for cells that differ in
    what they were measured on."""
  target, landings = common_loss(runs)
  frame = run_frame(runs, but=("steps",))
  frame = frame[frame.recipe == FULL_PRECISION]
  missing = [text for landing in landings for text in _not_landed(landing)]
  rows = [row for landing in landings for row in _landed(landing, frame, target)]
  places = pd.DataFrame(rows, columns=PLACE)
  landed = {run.name: run for run in frame.run if run.name in set(places.run)}
  cells = _quantized(list(landed.values()), metric, settings, folders)
  for way in WAYS:
    of_way = places[places.way == way][["run", "step"]]
    # At a landing the losses agree; the steps need not.
    ptq_degradation.check_cells(cells.merge(of_way), but=("step",))
  pairs = cells[["recipe", "method"]].drop_duplicates() if len(cells) else DEFAULT
  keys = ["recipe", "method", "run", "step"]
  values = places.merge(pairs, how="cross").merge(
    cells[[*keys, "full_precision_loss", metric]].rename(columns={metric: "value"}), "left", keys
  )
  for run, lacking in values[values.value.isna()].groupby("run", sort=False):
    missing.append(_not_measured(lacking, metric, landed[str(run)].config, cells, settings))
  values = values[values.value.notna()].reset_index(drop=True)
  means = _means(values, metric)
  return LandingComparison(
    target, metric, values, means, _differences(values), _orders(means), missing
  )


def _not_landed(landing: Landing) -> Iterator[str]:
  """Sentences on an optimizer's missing landings."""
  for way, point, which in (
    ("nearest", landing.checkpoint, "that all seeds still have"),
    ("crossing", landing.crossing, "at or below the common loss"),
  ):
    if point is None:
      yield (
        f"{landing.optimizer}, {way}: no checkpoint {which}; train with a smaller "
        "checkpoint.every, and keep more of them: checkpoint.keep_every"
      )
  if not _trained_again(landing):
    yield (
      f"{landing.optimizer}, re-run: no run of about {landing.steps} steps at learning rate "
      f"{landing.learning_rate:g}: python -m beyond_outliers.analysis --root=ROOT --common_loss "
      "--overrides=common.json, then python -m launch.local "
      f"--config=configs/{landing.optimizer}.py --root=ROOT/common --overrides=common.json"
    )


def _trained_again(landing: Landing) -> bool:
  """Whether there is a run that ends at the common loss; the worst optimizer's own does."""
  return landing.ending.step < landing.best.step or landing.steps == landing.best.step


def _landed(landing: Landing, frame: pd.DataFrame, target: float) -> Iterator[tuple[Any, ...]]:
  """Values of PLACE for every seed's model, at each landing that exists."""
  seeds = [run.config.seed for run in landing.runs]
  own = frame[(frame.optimizer == landing.optimizer) & (frame.rate == landing.learning_rate)]
  ends = own[(own.steps == landing.ending.step) & own.seed.isin(seeds)]
  for way, point, found in (
    ("re-run", landing.ending if _trained_again(landing) else None, ends.run),
    ("nearest", landing.checkpoint, landing.runs),
    ("crossing", landing.crossing, landing.runs),
  ):
    if point is None:
      continue
    for run in found:
      position = schedule_position(run.config, point.step)
      name, seed, off = landing.optimizer, run.config.seed, point.loss - target
      yield way, name, seed, run.name, point.step, *position, off


def _quantized(
  runs: Sequence[runs_lib.Run],
  metric: str,
  settings: Mapping[str, str] | None,
  folders: Sequence[PathLike],
) -> pd.DataFrame:
  """The runs' quantized cells at every step, joined with full precision. Errors: ConfigError for a
  metric that no cell has."""
  found, _ = ptq_degradation.find_cells(runs, settings, folders, but=("step",))
  cells = ptq_degradation.cell_table(found)
  if not (cells.method != "none").any():
    return cells[:0].assign(full_precision_loss=0.0, **{metric: 0.0})
  joined = ptq_degradation.beside_full_precision(cells)
  of_cells = {
    *ptq_degradation.ORIGIN,
    *ptq_degradation.MEASURED_ON,
    *("step", "full_precision_loss"),
  }
  known = [name for name in map(str, joined.select_dtypes("number")) if name not in of_cells]
  require(metric in known, "metric", metric, f"no cell has it; {nearest(metric, known)}")
  return joined


def _not_measured(
  lacking: pd.DataFrame,
  metric: str,
  c: config.Config,
  cells: pd.DataFrame,
  settings: Mapping[str, str] | None,
) -> str:
  """A sentence on the cells that a run lacks, with the command that measures them as the others."""
  unlike = {"documents": c.eval.documents, "context": c.context, "average": ""}
  alike = {
    name: cells[name].iloc[0]
    for name, own in unlike.items()
    if len(cells) and cells[name].nunique() == 1 and cells[name].iloc[0] != own
  }
  run, steps, recipes, methods = (
    ",".join(dict.fromkeys(map(str, lacking[name]))) for name in ("run", "step", "recipe", "method")
  )
  command = ptq_degradation.evaluation_command(
    run,
    recipes,
    methods,
    step=steps,
    propagation=metric.startswith("propagation/"),
    settings={**alike, **(settings or {})},
  )
  places = lacking[["way", "step"]].drop_duplicates().itertuples()
  where = ", ".join(f"{place.way} at step {place.step}" for place in places)
  return (
    f"{c.optimizer.name}, seed {c.seed}, {where}: no {metric} of {recipes} by {methods}: {command}"
  )


def _means(values: pd.DataFrame, metric: str) -> pd.DataFrame:
  keys = ["recipe", "method", "way", "optimizer"]
  found = values.groupby(keys).agg(
    value=("value", "mean"),
    value_stderr=("value", "sem"),
    seeds=("value", "size"),
    **{name: (name, "first") for name in ("step", "fraction", "rate", "off")},
  )
  higher = bool(ptq_degradation.HIGHER_IS_BETTER.search(metric))
  ranks = found.groupby(keys[:-1]).value.rank(ascending=not higher)
  return found.assign(place=ranks).reset_index()


def _differences(values: pd.DataFrame) -> pd.DataFrame:
  rows = []
  for (recipe, method, optimizer), own in values.groupby(["recipe", "method", "optimizer"]):
    by_way = {way: of_way.set_index("seed").value for way, of_way in own.groupby("way")}
    for way, other in itertools.combinations([way for way in WAYS if way in by_way], 2):
      pairs = pd.concat([by_way[way], by_way[other]], axis=1, join="inner").to_numpy()
      if not len(pairs):
        continue
      tested = len(pairs) > 1 and np.isfinite(pairs).all()
      p = paired_difference(pairs[:, 0], pairs[:, 1]).p if tested else math.nan
      with np.errstate(invalid="ignore"):  # a broken model's values are not finite
        found = (*estimate(pairs[:, 1] - pairs[:, 0]), p, len(pairs))
      rows.append((recipe, method, optimizer, way, other, *found))
  names = ["recipe", "method", "optimizer", "way", "other", "value", "value_stderr", "p", "seeds"]
  return pd.DataFrame(rows, columns=names)


def _orders(means: pd.DataFrame) -> pd.DataFrame:
  rows = []
  for (recipe, method), own in means.groupby(["recipe", "method"]):
    places = own.pivot(index="optimizer", columns="way", values="place")
    for way, other in itertools.combinations([way for way in WAYS if way in places], 2):
      both = places[[way, other]].dropna()
      exchanged = [
        f"{a}, {b}"
        for a, b in itertools.combinations(both.index, 2)
        if (both.loc[a] - both.loc[b]).prod() < 0
      ]
      if len(both) > 1:
        row = (recipe, method, way, other, len(both), bool(exchanged), "; ".join(exchanged))
        rows.append(row)
  names = ["recipe", "method", "way", "other", "optimizers", "changes", "exchanged"]
  return pd.DataFrame(rows, columns=names)
