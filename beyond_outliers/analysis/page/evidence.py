"""Evidence for the report: runs in groups that are comparable, and the analyses' results for each.

Every result is computed once. If an analysis refuses, its result is empty, and the refusal's
message is kept as the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import pandas as pd

from beyond_outliers import quant
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import along_training, law_points, predictors, scaling_law
from beyond_outliers.analysis.common_loss import Landing, common_loss
from beyond_outliers.analysis.landings import LandingComparison, compare_landings
from beyond_outliers.analysis.page.snapshot import Snapshot
from beyond_outliers.analysis.page.text import own_roots
from beyond_outliers.analysis.ptq_degradation import degradation_cells, without_a_run
from beyond_outliers.analysis.qat_gap import Gap, qat_gaps
from beyond_outliers.analysis.tuning import FULL_PRECISION, Tuning, check_comparable, tunings
from beyond_outliers.errors import ConfigError, Refusal
from beyond_outliers.types import PathLike

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Found(Generic[T]):
  """What an analysis found; if it refused, an empty value and the reason, in one line."""

  value: T
  problem: str = ""


def attempt(find: Callable[[], T], nothing: T) -> Found[T]:
  try:
    return Found(find())
  except Refusal as refusal:
    return Found(nothing, str(refusal))


@dataclasses.dataclass(frozen=True)
class RunGroup:
  """Runs of one length whose losses are comparable, and shorter ones on the way to the common loss.

  apart: why these are not in the first group; empty for the first."""

  runs: Sequence[runs_lib.Run]
  shorter: Sequence[runs_lib.Run]
  settings: Mapping[str, str]
  folders: Sequence[PathLike]
  apart: str = ""

  @property
  def title(self) -> str:
    c = self.runs[0].config
    return f"{c.size}, {c.steps} steps"

  @property
  def extent(self) -> str:
    """Tokens, and tokens per parameter, in words."""
    c = self.runs[0].config
    tokens = c.steps * c.batch_size * c.context
    total = parameters(self.runs[0])
    return f"{tokens:,} tokens" + (f", {tokens / total:.3g} per parameter" if total else "")

  @property
  def cell_flags(self) -> list[str]:
    """Flags of a command, for the cells of this report."""
    given = {
      "cells": [os.fspath(folder) for folder in self.folders],
      "settings": [f"{name}={value}" for name, value in self.settings.items()],
    }
    return [f"--{name}={','.join(values)}" for name, values in given.items() if values]

  @property
  def cell_arguments(self) -> str:
    """Arguments of a call in Python, for the cells of this report."""
    folders = [os.fspath(folder) for folder in self.folders]
    given = {"settings": dict(self.settings), "folders": folders}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value)

  @property
  def name(self) -> str:
    """The group's part in names of files."""
    c = self.runs[0].config
    return re.sub(r"[^\w.]", "_", f"{c.size}-{c.steps}")

  @functools.cached_property
  def tunings(self) -> Found[list[Tuning]]:
    return attempt(lambda: tunings(self.runs), [])

  @functools.cached_property
  def gaps(self) -> Found[tuple[list[Gap], list[str]]]:
    return attempt(lambda: qat_gaps(self.runs), ([], []))

  @functools.cached_property
  def best(self) -> list[runs_lib.Run]:
    """The runs in full precision at each optimizer's best rate, of all seeds."""
    rates = {t.optimizer: t.learning_rate for t in self.tunings.value if t.recipe == FULL_PRECISION}
    return [
      run
      for run in self.runs
      if recipe_of(run) == FULL_PRECISION
      and rates.get(run.config.optimizer.name) == run.config.optimizer.learning_rate
    ]

  @functools.cached_property
  def cells(self) -> Found[pd.DataFrame]:
    return self._of_cells(predictors.frame)

  @functools.cached_property
  def measured(self) -> Found[pd.DataFrame]:
    """Every cell of the last steps, including those of the models as they were trained, which
    `cells` lacks."""
    return self._of_cells(degradation_cells)

  @functools.cached_property
  def units(self) -> Found[pd.DataFrame]:
    return self._of_cells(predictors.units)

  @functools.cached_property
  def along(self) -> Found[pd.DataFrame]:
    return self._of_cells(along_training.frame)

  def _of_cells(self, read: Callable[..., pd.DataFrame]) -> Found[pd.DataFrame]:
    if not self.best:
      return Found(pd.DataFrame(), self.tunings.problem or "there is no run in full precision")
    return attempt(lambda: read(self.best, self.settings, self.folders), pd.DataFrame())

  @functools.cached_property
  def not_landed(self) -> list[str]:
    """Optimizers without a finished learning rate in full precision, so without a best loss."""
    return [
      t.optimizer
      for t in self.tunings.value
      if t.recipe == FULL_PRECISION and not math.isfinite(t.loss)
    ]

  @functools.cached_property
  def _landing(self) -> list[runs_lib.Run]:
    every = [*self.runs, *self.shorter]
    return [run for run in every if run.config.optimizer.name not in self.not_landed]

  @functools.cached_property
  def landings(self) -> Found[tuple[float, list[Landing]]]:
    return attempt(lambda: common_loss(self._landing), (float("nan"), []))

  @functools.cached_property
  def landing_costs(self) -> Found[LandingComparison | None]:
    found = {"settings": self.settings, "folders": self.folders}
    return attempt(lambda: compare_landings(self._landing, **found), None)


@dataclasses.dataclass(frozen=True)
class Law:
  """A scaling law, over all sizes, of one data set and ratio of tokens to parameters."""

  title: str
  runs: int
  law: Found[scaling_law.ScalingLaw | None]
  points: pd.DataFrame
  left_out: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Runs below `roots`, as the report reads them. unread: sentences on runs that cannot be read,
  and on cells of none of the runs."""

  roots: Sequence[str]
  runs: Sequence[runs_lib.Run]
  unread: Sequence[str]
  groups: Sequence[RunGroup]

  def roots_of(self, group: RunGroup) -> Sequence[str]:
    """Folders for a printed report on one group, since such reports refuse to mix groups."""
    own = [run.name for run in [*group.runs, *group.shorter]]
    return own_roots(self.roots, own, [run.name for run in self.runs])

  @functools.cached_property
  def laws(self) -> list[Law]:
    """A law per data set, tokenizer, and ratio of tokens to parameters."""
    alike: dict[tuple[str, str, str], list[runs_lib.Run]] = {}
    for group in self.groups:
      data, c = group.runs[0].trained_on, group.runs[0].config
      tokens, total = c.steps * c.batch_size * c.context, parameters(group.runs[0])
      ratio = f"{tokens / total:.2g}" if total else "an unknown number of"
      alike.setdefault((data["fingerprint"], data["tokenizer"], ratio), []).extend(group.runs)
    return [
      _law(f"data {data[:12]}, {ratio} tokens per parameter", own)
      for (data, _, ratio), own in alike.items()
    ]


def _law(title: str, own: Sequence[runs_lib.Run]) -> Law:
  points = attempt(lambda: law_points.of_runs(own), (pd.DataFrame(), []))
  frame, left_out = points.value
  if points.problem:
    return Law(title, len(own), Found(None, points.problem), frame, left_out)
  names = list(dict.fromkeys(frame["optimizer"][frame["recipe"] == FULL_PRECISION]))
  reference = ("adamw" if "adamw" in names or not names else names[0], FULL_PRECISION)
  law = attempt(lambda: scaling_law.fit(frame, reference=reference), None)
  return Law(title, len(own), law, frame, left_out)


def gather(
  runs: Sequence[runs_lib.Run],
  roots: Sequence[str] = (),
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> Evidence:
  """The runs in groups. roots: where they were found, as the report names them.

  settings, folders: of cells, see `predictors.frame`."""
  unread, readable = [], []
  for run in (Snapshot(run.path, run.name) for run in runs):
    check = attempt(lambda run=run: _read(run), None)
    (unread.append(_with_path(run, check.problem)) if check.problem else readable.append(run))
  unread += without_a_run(readable, folders)
  groups = [
    RunGroup(own, shorter, settings or {}, folders, apart)
    for alike, apart in _alike(readable)
    for own, shorter in _by_length(alike)
  ]
  named = roots or [os.path.commonpath([run.name for run in runs])] if runs else roots
  return Evidence(named, readable, unread, groups)


def _read(run: runs_lib.Run) -> None:
  """Reads all that the report will. Errors: WorkdirError."""
  _ = run.config, run.status, run.trained_on, run.identity
  if run.status["step"]:
    run.metrics()


def _with_path(run: runs_lib.Run, problem: str) -> str:
  return problem if run.name in problem else f"{run.name}: {problem}"


def _alike(runs: Sequence[runs_lib.Run]) -> list[tuple[list[runs_lib.Run], str]]:
  """(runs that are comparable except for length, why they are not in the first group that refused
  them), by model size; see `tuning.check_comparable`."""
  found: list[tuple[list[runs_lib.Run], str]] = []
  for run in runs:
    why = ""
    for group, _ in found:
      one_of_each = {(other.config.optimizer.name, recipe_of(other)): other for other in group}
      try:
        check_comparable([*one_of_each.values(), run], but=("steps",))
      except ConfigError as refusal:
        why = why or str(refusal)
        continue
      group.append(run)
      break
    else:
      found.append(([run], why))
  return sorted(found, key=lambda pair: parameters(pair[0][0]))


def parameters(run: runs_lib.Run) -> int:
  """Parameters of a run's model, the embedding's included; 0 if its manifest does not say."""
  return attempt(lambda: run.parameter_counts["total"], 0).value


def _by_length(
  alike: Sequence[runs_lib.Run],
) -> list[tuple[list[runs_lib.Run], list[runs_lib.Run]]]:
  """[(runs of one length, shorter runs), ...]. The longest length, and every length that all
  optimizers were trained for, has an entry of its own; runs of other lengths are taken as on the
  way to the common loss of the next longer entry."""
  optimizers = {run.config.optimizer.name for run in alike}
  by_steps: dict[int, list[runs_lib.Run]] = {}
  for run in sorted(alike, key=lambda run: -run.config.steps):
    by_steps.setdefault(run.config.steps, []).append(run)
  found: list[tuple[list[runs_lib.Run], list[runs_lib.Run]]] = []
  for own in by_steps.values():
    if not found or {run.config.optimizer.name for run in own} == optimizers:
      found.append((own, []))
    else:
      found[-1][1].extend(own)
  return found


def recipe_of(run: runs_lib.Run) -> str:
  """The name of the run's recipe."""
  return quant.recipes.name_of(run.config.quant)
