"""Figures (extra: report). Each takes what it shows and a path, and writes a PNG."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import figure as figure_lib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from beyond_outliers.analysis.qat_gap import Gap
from beyond_outliers.analysis.statistics import Estimate, estimate
from beyond_outliers.analysis.tuning import Tuning
from beyond_outliers.config.checks import require
from beyond_outliers.types import PathLike

# One colour per optimizer in every figure: Okabe and Ito's colour-blind safe palette.
COLORS = {
  "adamw": "#000000",
  "muon": "#0072B2",
  "psgd": "#CC79A7",
  "scion": "#56B4E9",
  "shampoo": "#D55E00",
  "soap": "#009E73",
}
LINES = ("-", "--", ":", "-.")  # of the first recipe, the second, ...
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_loss_curves(tunings: Sequence[Tuning], path: PathLike) -> None:
  """Training losses of the best runs over steps, and validation losses over learning rates.

  Errors: ConfigError where no run came to its end."""
  finite = [loss for t in tunings for loss in t.losses.values() if loss < float("inf")]
  require(
    bool(finite),
    "--plot",
    str(path),
    "no learning rate has all its runs done, so there is no loss to draw; finish some",
  )
  figure, (curves, rates) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
  recipes = list(dict.fromkeys(t.recipe for t in tunings))
  for t in tunings:
    line = LINES[recipes.index(t.recipe) % len(LINES)]
    label = f"{t.optimizer}, {t.learning_rate:g}" + (f", {t.recipe}" if len(recipes) > 1 else "")
    _draw_curve(curves, t, line, label)
    _draw_rates(rates, t, line)
  curves.set(
    xlabel="step",
    ylabel="loss (nats)",
    title="training (lines) and validation (points), best rate of each",
  )
  rates.set(
    xlabel="learning rate",
    ylabel="validation loss (nats)",
    xscale="log",
    title="validation loss after the last step",
  )
  curves.legend(frameon=False)
  # First steps at rates that begin badly, and rates that lead nowhere, would flatten what the
  # figure is about.
  curves.set_ylim(top=min(curves.get_ylim()[1], min(finite) + 4.0))
  rates.set_ylim(min(finite) - 0.1, min(min(finite) + 2.0, max(finite) + 0.1))
  _finish(figure, path)


def _draw_curve(axes: Axes, t: Tuning, line: str, label: str) -> None:
  metrics, color = t.best[0].metrics(), COLORS.get(t.optimizer)
  loss, evaluated = metrics["train/loss"].dropna(), metrics["eval/loss"].dropna()
  axes.plot(loss.index, loss, linewidth=1.5, linestyle=line, color=color, label=label)
  axes.plot(evaluated.index, evaluated, "o", markersize=4, color=color)


def _draw_rates(axes: Axes, t: Tuning, line: str) -> None:
  color, rates, losses = COLORS.get(t.optimizer), list(t.losses), list(t.losses.values())
  axes.plot(rates, losses, "o", linestyle=line, markersize=4, linewidth=1.5, color=color)
  axes.plot([t.learning_rate], [t.loss], "o", markersize=9, fillstyle="none", color=color)


def plot_qat_gaps(gaps: Sequence[Gap], path: PathLike) -> None:
  """Each optimizer's loss in full precision and under every recipe, and the difference, with
  standard errors over seeds."""
  recipes = list(dict.fromkeys(gap.recipe for gap in gaps))
  names = list(dict.fromkeys(gap.optimizer for gap in gaps))  # smallest gap first, so on top
  figure, (losses, differences) = plt.subplots(
    1, 2, figsize=(11, 1.6 + 0.45 * len(names)), sharey=True, layout="constrained"
  )
  for gap in gaps:
    color, marker = COLORS.get(gap.optimizer), MARKERS[recipes.index(gap.recipe) % len(MARKERS)]
    # Recipes of one optimizer next to each other, all within its line.
    row = names.index(gap.optimizer) + 0.24 * (recipes.index(gap.recipe) - (len(recipes) - 1) / 2)
    full, under = (estimate(side) for side in gap.losses)
    losses.plot([full.mean, under.mean], [row, row], color=color, alpha=0.35, linewidth=1)
    _draw_estimate(losses, full, row, color, marker, "white")
    _draw_estimate(losses, under, row, color, marker, color)
    _draw_estimate(differences, gap.loss, row, color, marker, color)
  for recipe, marker in zip(["full precision", *recipes], ["o", *MARKERS], strict=False):
    face = "white" if recipe == "full precision" else "black"
    losses.plot([], [], marker, color="black", markerfacecolor=face, markersize=6, label=recipe)
  losses.legend(frameon=False)
  losses.set(xlabel="validation loss (nats)", title="validation loss after the last step")
  losses.set_yticks(range(len(names)), names)
  losses.set_ylim(len(names) - 0.5, -0.5)
  differences.axvline(0, color="black", linewidth=0.8)
  differences.set(
    xlabel="loss under the recipe − in full precision (nats)",
    title="what the recipe costs, ± standard error",
  )
  _finish(figure, path)


def _draw_estimate(
  axes: Axes, value: Estimate, row: float, color: str | None, marker: str, face: str | None
) -> None:
  style = {"color": color, "marker": marker, "markerfacecolor": face, "markersize": 6, "capsize": 3}
  axes.errorbar(value.mean, row, xerr=value.stderr, **style)


def _finish(figure: figure_lib.Figure, path: PathLike) -> None:
  for axes in figure.axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  figure.savefig(path, dpi=130)
  plt.close(figure)
