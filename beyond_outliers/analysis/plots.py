"""Figures (extra: report). Each takes what it shows and a path, and writes a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from beyond_outliers.analysis.qat_gap import Gap, estimate
from beyond_outliers.analysis.tuning import Tuning
from beyond_outliers.config.checks import require

# One colour an optimizer in every figure (Okabe and Ito's palette, told apart by the colour-blind
# too).
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


def loss_curves(tunings: Sequence[Tuning], path: Any) -> None:
  """Training loss of each optimizer's best run over the steps, and how the validation loss depends
  on the learning rate.

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
    metrics = t.best[0].metrics()
    loss = metrics["train/loss"].dropna()
    color = COLORS.get(t.optimizer)
    curves.plot(
      loss.index,
      loss,
      linewidth=1.5,
      linestyle=line,
      color=color,
      label=f"{t.optimizer}, {t.learning_rate:g}" + (f", {t.recipe}" if len(recipes) > 1 else ""),
    )
    evaluated = metrics["eval/loss"].dropna()
    curves.plot(evaluated.index, evaluated, "o", markersize=4, color=color)
    rates.plot(
      list(t.losses),
      list(t.losses.values()),
      "o",
      linestyle=line,
      markersize=4,
      linewidth=1.5,
      color=color,
    )
    rates.plot(
      [t.learning_rate],
      [t.losses[t.learning_rate]],
      "o",
      markersize=9,
      fillstyle="none",
      color=color,
    )
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


def gaps(found: Sequence[Gap], path: Any) -> None:
  """Each optimizer's loss in full precision and under every recipe, and the difference, with
  standard errors over seeds."""
  recipes = list(dict.fromkeys(gap.recipe for gap in found))
  names = list(dict.fromkeys(gap.optimizer for gap in found))  # smallest gap first, so on top
  figure, (losses, differences) = plt.subplots(
    1, 2, figsize=(11, 1.6 + 0.45 * len(names)), sharey=True, layout="constrained"
  )
  for gap in found:
    color, marker = COLORS.get(gap.optimizer), MARKERS[recipes.index(gap.recipe) % len(MARKERS)]
    # Recipes of one optimizer beside each other, all within its line.
    row = names.index(gap.optimizer) + 0.24 * (recipes.index(gap.recipe) - (len(recipes) - 1) / 2)
    full, under = (estimate(side) for side in gap.losses)
    losses.plot([full.mean, under.mean], [row, row], color=color, alpha=0.35, linewidth=1)
    for axes, value, face in (
      (losses, full, "white"),
      (losses, under, color),
      (differences, gap.loss, color),
    ):
      axes.errorbar(
        value.mean,
        row,
        xerr=value.stderr,
        color=color,
        marker=marker,
        markerfacecolor=face,
        markersize=6,
        capsize=3,
      )
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


def _finish(figure: Any, path: Any) -> None:
  for axes in figure.axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  figure.savefig(path, dpi=130)
  plt.close(figure)
