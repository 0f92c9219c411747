"""Figures of training: losses, gaps under recipes, degradation along a run, scaling laws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beyond_outliers.analysis.plots import style
from beyond_outliers.analysis.plots.style import (
  LINES,
  MARKERS,
  canvas,
  color_of,
  label,
  log_scale,
  optimizer_legend,
)
from beyond_outliers.analysis.qat_gap import Gap
from beyond_outliers.analysis.scaling_law import ScalingLaw
from beyond_outliers.analysis.statistics import Estimate, estimate
from beyond_outliers.analysis.tuning import FULL_PRECISION, Tuning
from beyond_outliers.config.checks import require
from beyond_outliers.types import PathLike

POINTS = 200  # of a curve, at most: more could not be seen


def plot_loss_curves(tunings: Sequence[Tuning], path: PathLike = "") -> Figure:
  """Training losses of the best runs over steps, and validation losses over learning rates.

  Errors: ConfigError if no learning rate has all its runs done."""
  finite = [loss for t in tunings for loss in t.losses.values() if loss < float("inf")]
  require(
    bool(finite),
    "--plot",
    str(path),
    "no learning rate has all its runs done, so there is no loss to draw; finish some",
  )
  recipes = list(dict.fromkeys(t.recipe for t in tunings))
  with canvas(path, 1, 2, (9, 4.2)) as (figure, ((curves, rates),)):
    for t in tunings:
      line = LINES[recipes.index(t.recipe) % len(LINES)]
      _draw_curve(curves, t, line)
      _draw_rates(rates, t, line)
    curves.set(
      xlabel="step",
      ylabel="loss (nats)",
      title="training (lines) and validation (points) at the best rate",
    )
    rates.set(
      xlabel="learning rate",
      ylabel="validation loss (nats)",
      title="after the last step; best rate circled",
    )
    # High losses, in the first steps or at bad rates, would flatten what the figure is about.
    curves.set_ylim(top=min(curves.get_ylim()[1], min(finite) + 4.0))
    rates.set_ylim(min(finite) - 0.1, min(min(finite) + 2.0, max(finite) + 0.1))
    _mark_rates(rates, tunings)
    lines = {
      _in_words(recipe): {"linestyle": LINES[at % len(LINES)]} for at, recipe in enumerate(recipes)
    }
    optimizer_legend(figure, [t.optimizer for t in tunings], lines if len(recipes) > 1 else None)
  return figure


def _in_words(recipe: str) -> str:
  return "full precision" if recipe == FULL_PRECISION else recipe


def _draw_curve(axes: Axes, t: Tuning, line: str) -> None:
  metrics, color = t.best[0].metrics(), color_of(t.optimizer)
  loss, evaluated = _thinned(metrics["train/loss"].dropna()), metrics["eval/loss"].dropna()
  axes.plot(loss.index, loss, linestyle=line, color=color)
  axes.plot(evaluated.index, evaluated, "o", markersize=4, color=color)


def _thinned(curve: pd.Series) -> pd.Series:
  """Means of runs of neighbouring values, POINTS at most."""
  block = -(-len(curve) // POINTS)
  number = np.arange(len(curve)) // max(block, 1)
  return pd.Series(
    curve.groupby(number).mean().to_numpy(), curve.index.to_series().groupby(number).mean()
  )


def _draw_rates(axes: Axes, t: Tuning, line: str) -> None:
  color, rates, losses = color_of(t.optimizer), list(t.losses), list(t.losses.values())
  axes.plot(rates, losses, "o", linestyle=line, markersize=4, color=color)
  axes.plot([t.learning_rate], [t.loss], "o", markersize=9, fillstyle="none", color=color)


def _mark_rates(axes: Axes, tunings: Sequence[Tuning]) -> None:
  """A logarithmic axis with a tick at every rate, unless there are many."""
  values = sorted({rate for t in tunings for rate in t.losses})
  log_scale(axes, "x")
  if len(values) < 12:
    axes.set_xticks(
      values, [f"{value:g}" for value in values], rotation=45 if len(values) > 6 else 0
    )
    axes.tick_params(axis="x", which="minor", bottom=False)


def plot_qat_gaps(gaps: Sequence[Gap], path: PathLike = "") -> Figure:
  """Each optimizer's loss in full precision and under every recipe, and the difference, with
  standard errors over seeds."""
  recipes = list(dict.fromkeys(gap.recipe for gap in gaps))
  names = list(dict.fromkeys(gap.optimizer for gap in gaps))  # smallest gap first, so on top
  spread = 0.24 if len(recipes) < 4 else 0.8 / len(recipes)
  size = 9, 1.8 + max(0.45, 0.2 * len(recipes)) * len(names)
  with canvas(path, 1, 2, size, sharey=True) as (figure, ((losses, differences),)):
    for gap in gaps:
      color, marker = color_of(gap.optimizer), MARKERS[recipes.index(gap.recipe) % len(MARKERS)]
      # An optimizer's recipes are side by side within its row.
      offset = recipes.index(gap.recipe) - (len(recipes) - 1) / 2
      row = names.index(gap.optimizer) + spread * offset
      full, under = (estimate(side) for side in gap.losses)
      losses.plot([full.mean, under.mean], [row, row], color=color, alpha=0.35, linewidth=1)
      _draw_estimate(losses, full, row, color, "o", "white")
      _draw_estimate(losses, under, row, color, marker, color)
      _draw_estimate(differences, gap.loss, row, color, marker, color)
    losses.set(xlabel="validation loss (nats)", title="after the last step")
    losses.set_yticks(range(len(names)), [label(name) for name in names])
    losses.set_ylim(len(names) - 0.5, -0.5)
    differences.axvline(0, color="black", linewidth=0.8)
    differences.set(
      xlabel="loss under the recipe − in full precision (nats)",
      title="what the recipe costs, ± standard error over seeds",
    )
    marks = {
      "full precision": {"marker": "o", "markerfacecolor": "white", "linestyle": ""},
      **{
        recipe: {"marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
        for i, recipe in enumerate(recipes)
      },
    }
    optimizer_legend(figure, [], marks)
  return figure


def _draw_estimate(
  axes: Axes, value: Estimate, row: float, color: str, marker: str, face: str
) -> None:
  error = value.stderr if value.stderr == value.stderr else None
  style_of = {"color": color, "marker": marker, "markerfacecolor": face, "capsize": 3}
  axes.errorbar(value.mean, row, xerr=error, markersize=6, **style_of)


def plot_along_training(along: pd.DataFrame, path: PathLike = "") -> Figure:
  """Degradation δ = CE(quantized)/CE − 1 of runs' checkpoints over the share of training completed;
  below it, the learning rate relative to its peak.

  along: rows of `along_training.frame`; one column of panels per recipe and method with several
    checkpoints, two at most."""
  steps = along.groupby(["recipe", "method"])["step"].nunique()
  every = style.quantizations(along)
  pairs = [pair for pair in every if steps[pair] > 1][:2] or every[:1]
  size = 4.8 * max(len(pairs), 1.3), 4.4
  with canvas(path, 2, len(pairs), size, sharex=True, height_ratios=[3, 1]) as (figure, axes):
    for (top, below), pair in zip(axes.T, pairs, strict=True):
      rows = style.of_quantization(along, pair)
      for (average, name), own in rows.groupby(["average", "optimizer"], sort=False):
        color, line = color_of(name), "--" if average else "-"
        if own["seed"].nunique() > 1:
          for _, one in own.sort_values("fraction").groupby("run", sort=False):
            top.plot(one["fraction"], 100 * one["delta"], line, color=color, alpha=0.3, linewidth=1)
        means = own.groupby("fraction")[["delta", "rate"]].mean()
        top.plot(means.index, 100 * means["delta"], f"o{line}", markersize=3, color=color)
        below.plot(means.index, means["rate"], color=color, linewidth=1)
      top.set(title=", ".join(map(label, pair)))
      if style.wide(rows["delta"]):
        log_scale(top, "y")
      below.set(xlabel="share of training", ylim=(-0.05, 1.1))
    axes[0, 0].set(ylabel="δ = CE(quantized)/CE − 1 (%)")
    axes[1, 0].set(ylabel="rate / peak")
    averaged = {
      f"weights averaged, {text}": {"linestyle": "--"} for text in along["average"] if text
    }
    optimizer_legend(figure, along["optimizer"], averaged)
  return figure


def plot_scaling_law(
  law: ScalingLaw, path: PathLike = "", points: pd.DataFrame | None = None
) -> Figure:
  """The share rho of its parameters that a model is worth under a recipe, by optimizer, with the
  fit's intervals; and given `points`, the runs of the fit, the law through their losses."""
  pairs = [pair for pair in law.rho if pair[1] != law.reference[1]] or list(law.rho)
  panels = 1 if points is None else 2
  size = 4.6 * max(panels, 1.2), 1.6 + max(2.4, 0.3 * len(pairs))
  with canvas(path, 1, panels, size) as (figure, (axes,)):
    if points is not None:
      _draw_law(axes[0], law, points)
    _draw_rho(axes[-1], law, pairs)
    recipes = list(dict.fromkeys(recipe for _, recipe in law.rho))
    marks = {
      _in_words(recipe): {"marker": MARKERS[at % len(MARKERS)], "linestyle": LINES[at % len(LINES)]}
      for at, recipe in enumerate(recipes)
    }
    optimizer_legend(figure, [pair[0] for pair in law.rho], marks if points is not None else None)
  return figure


def _draw_law(axes: Axes, law: ScalingLaw, points: pd.DataFrame) -> None:
  recipes = list(dict.fromkeys(recipe for _, recipe in law.rho))
  N = points["parameters"] - (0 if law.embedding else points["embedding"])
  D = points["tokens"].to_numpy(float)
  for pair in law.rho:
    own = ((points["optimizer"] == pair[0]) & (points["recipe"] == pair[1])).to_numpy()
    order = np.argsort(N[own].to_numpy())
    color, at = color_of(pair[0]), recipes.index(pair[1])
    marker, line = MARKERS[at % len(MARKERS)], LINES[at % len(LINES)]
    losses = points["loss"].to_numpy(float)[own]
    axes.plot(N[own], losses, marker, markersize=4, color=color)
    if law.law == "two_term":
      sizes, tokens = N[own].to_numpy()[order], D[own][order]
      curve = law.predict(sizes, tokens, optimizer=pair[0], recipe=pair[1])
    else:
      sizes = np.geomspace(N.min(), N.max(), 60)
      curve = law.predict(sizes, optimizer=pair[0], recipe=pair[1])
    axes.plot(sizes, curve, line, linewidth=1, color=color)
  counted = "with" if law.embedding else "without"
  axes.set(xlabel=f"parameters, {counted} the embedding", ylabel="validation loss (nats)")
  axes.set_title("law (lines) and runs (points)")
  log_scale(axes, "x")
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 500k, 1M


def _draw_rho(axes: Axes, law: ScalingLaw, pairs: Sequence[tuple[str, str]]) -> None:
  for row, pair in enumerate(pairs):
    names = [f"{rho}({', '.join(pair)})" for rho in ("rho", "rho_N")]
    name = next((name for name in names if name in law.params), None)
    value = 1.0 if name is None else law.params[name]
    color = color_of(pair[0])
    if name is not None:
      low, high = law.intervals[name].profile
      axes.plot([low, high], [row, row], color=color, linewidth=1.5)
    axes.plot([value], [row], "o", color=color)
  axes.axvline(1, color="black", linewidth=0.8)
  axes.set_yticks(range(len(pairs)), [label(", ".join(pair)) for pair in pairs])
  axes.set_ylim(len(pairs) - 0.5, -0.5)
  axes.set(
    xlabel="rho, the share of its parameters a model makes use of",
    title=f"rho and its profile interval, {100 * law.confidence:g} %",
  )
