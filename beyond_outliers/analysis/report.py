"""Reports that the command prints, one per question, and the launcher's file of overrides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

from etils import epath

from beyond_outliers import config, quant
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import plots, ptq_degradation, tables
from beyond_outliers.analysis.common_loss import Landing, common_loss
from beyond_outliers.analysis.qat_gap import Gap, compare_gaps, gaps_at_own_rates, qat_gaps
from beyond_outliers.analysis.tuning import (
  FULL_PRECISION,
  Tuning,
  judged_without,
  not_done,
  tunings,
)
from beyond_outliers.config.checks import require
from beyond_outliers.config.sizes import shape_of
from beyond_outliers.config.sums import sealed
from beyond_outliers.errors import ConfigError
from beyond_outliers.types import Json, PathLike

PAIRED = "paired by seed, Student's t after Holm"


class Settings(Protocol):
  """What a report chooses for an optimizer: a `Tuning` or a `Landing`."""

  @property
  def optimizer(self) -> str: ...

  @property
  def overrides(self) -> Json: ...


def print_tuning(
  runs: Sequence[runs_lib.Run], plot: PathLike = "", gap_plot: PathLike = ""
) -> list[Tuning]:
  """Prints each recipe's best learning rates and, with several recipes, each one's gap to full
  precision; returns the rates of full precision.

  plot, gap_plot: files to draw the loss curves and the gaps into, .png or .svg."""
  found = tunings(runs)
  recipes = list(dict.fromkeys(t.recipe for t in found))
  require(
    not gap_plot or len(recipes) > 1,
    "--gap_plot",
    gap_plot,
    f"all runs have the recipe {recipes[0]!r}; add the same runs under another one to --root",
  )
  for recipe in recipes:
    _print_rates(recipe, [t for t in found if t.recipe == recipe])
  if said := [*judged_without(found), *not_done(runs)]:
    print("\n".join([*said, ""]))
  if len(recipes) > 1:
    _print_gaps(runs, found, gap_plot)
  if plot:
    plots.plot_loss_curves(found, plot)
  return [t for t in found if t.recipe == FULL_PRECISION]


def _print_rates(recipe: str, found: Sequence[Tuning]) -> None:
  print(f"learning rates, recipe {recipe}\n\n{tables.tuning_table(found)}\n")
  for t in found:
    if t.at_the_edge and len(t.losses) > 1:
      print(
        f"{t.optimizer}: {t.learning_rate:g} lies on the edge of its grid {sorted(t.losses)}; "
        "widen it"
      )


def _print_gaps(runs: Sequence[runs_lib.Run], found: Sequence[Tuning], gap_plot: PathLike) -> None:
  gaps, left_out = qat_gaps(runs)
  _print_gap_tables("full precision against recipe", gaps)
  if any(len(t.losses) > 1 for t in found if t.recipe != FULL_PRECISION):
    print(f"learning rates tuned under a recipe\n\n{tables.retuning_table(found)}\n")
    if own := gaps_at_own_rates(runs, gaps):
      _print_gap_tables("full precision against recipe, each at its own best rate", own)
  print("\n".join(["left out:", *left_out]) if left_out else "nothing was left out")
  if gap_plot:
    plots.plot_qat_gaps(gaps, gap_plot)


def _print_gap_tables(title: str, gaps: Sequence[Gap]) -> None:
  print(f"{title}\n\n{tables.qat_gap_table(gaps)}\n")
  if compared := compare_gaps(gaps):
    print(
      f"gaps against none and each other, {PAIRED}\n\n{tables.gap_comparison_table(compared)}\n"
    )


def print_common_loss(runs: Sequence[runs_lib.Run]) -> list[Landing]:
  """Prints the optimizers' common loss in full precision and the lengths of runs that end at it."""
  loss, landings = common_loss(runs)
  print(f"common loss: {loss:.4f} nats\n\n{tables.common_loss_table(landings, loss)}")
  if said := not_done(runs):
    print("\n".join(["", *said]))
  return landings


def print_degradation(
  runs: Sequence[runs_lib.Run],
  metric: str,
  settings: Mapping[str, str],
  folders: Sequence[PathLike],
) -> None:
  """Prints a metric of evaluation jobs' cells, by recipe, method and optimizer.

  Arguments: see `ptq_degradation.degradation_cells`."""
  cells = ptq_degradation.degradation_cells(runs, settings, folders)
  print(tables.degradation_table(cells, metric))
  compared = ptq_degradation.compare_optimizers(cells, metric)
  if apart := [row for row in compared if not row[-1].tie]:
    print(f"\npairs, {PAIRED}\n\n{tables.ptq_comparison_table(apart)}")
  if alike := len(compared) - len(apart):
    print(f"\n{alike} of {len(compared)} pairs are not told apart")
  if said := cells.attrs["left_out"]:
    print("\n".join(["", *said]))


def check_ended(runs: Sequence[runs_lib.Run]) -> None:
  """Refuses to write what was found for full precision while one of its runs may still change it.

  Errors: ConfigError."""
  own = [run for run in runs if quant.recipes.name_of(run.config.quant) == FULL_PRECISION]
  if said := not_done(own, "diverged"):
    more = f" ({len(said)} such runs)" if len(said) > 1 else ""
    raise ConfigError(f"--overrides: {said[0]}{more}; finish it, or leave its folder out")


def write_overrides(path: PathLike, c: config.Config, found: Sequence[Settings]) -> None:
  """Writes the file for `launch.local --overrides`: {size, model: its shape, overrides: {optimizer:
  {config key: value}}}.

  c: the configuration of any of the runs. Errors: ConfigError if an optimizer occurs twice."""
  names = [one.optimizer for one in found]
  if len(set(names)) < len(names):
    raise ConfigError(f"{names}: one entry per optimizer; give those of one recipe")
  overrides = {one.optimizer: one.overrides for one in found}
  text = json.dumps(
    sealed({"size": c.size, "model": shape_of(c.model), "overrides": overrides}), indent=1
  )
  epath.Path(path).write_text(text + "\n")
