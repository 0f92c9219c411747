"""Figures of what quantization after training costs, and of what correlates with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beyond_outliers.analysis.landings import WAYS, LandingComparison
from beyond_outliers.analysis.plots import style
from beyond_outliers.analysis.plots.style import (
  canvas,
  color_of,
  in_order,
  label,
  log_scale,
  optimizer_legend,
)
from beyond_outliers.types import PathLike

# Axis labels with units, for metrics of what is lost; others are labelled by their names.
UNITS = {"loss_difference": "loss, quantized − full precision (nats)", "kl": "KL divergence (nats)"}


def plot_degradation(
  frame: pd.DataFrame, path: PathLike = "", lost: str = "loss_difference"
) -> Figure:
  """What was lost, by recipe and method, with a mark per optimizer: means over seeds ± standard
  errors, and seeds as small points. Values that are not finite are arrows at the edge.

  frame: rows of `predictors.frame`. In the figure, each recipe's cheapest method is on top."""
  rows = frame.assign(value=pd.to_numeric(frame[lost], errors="coerce"))
  rows = rows[rows["value"].notna()]
  means = style.over_seeds(rows.replace({"value": {np.inf: np.nan}}), ["recipe", "method"], "value")
  ordered = means.sort_values(["recipe", "mean"], kind="stable")
  pairs = list(zip(ordered["recipe"], ordered["method"], strict=True))
  optimizers = in_order(rows["optimizer"])
  with canvas(path, 1, 1, (9, 1.5 + (0.25 + 0.13 * len(optimizers)) * len(pairs))) as (
    figure,
    ((axes,),),
  ):
    if style.wide(rows["value"]):
      axes.set_xscale("log")
    for name, offset in zip(optimizers, style.beside(len(optimizers), 0.66), strict=True):
      for at, pair in enumerate(pairs):
        own = style.of_quantization(rows[rows["optimizer"] == name], pair)["value"]
        _draw_row(axes, own, at + offset, color_of(name))
    if axes.get_xscale() == "log":
      log_scale(axes, "x")
    else:
      axes.axvline(0, color="black", linewidth=0.8)
    for at in range(1, len(pairs)):
      axes.axhline(at - 0.5, color="black", linewidth=0.4, alpha=0.4)
    axes.set_yticks(range(len(pairs)), [", ".join(map(label, pair)) for pair in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=UNITS.get(lost, lost))
    optimizer_legend(figure, optimizers)
  return figure


def _draw_row(axes: Axes, own: pd.Series, at: float, color: str) -> None:
  finite = own[np.isfinite(own)]
  if len(finite) < len(own):
    axes.plot([1.0], [at], ">", color=color, transform=axes.get_yaxis_transform(), clip_on=False)
  if len(finite) > 1:
    axes.plot(finite, [at] * len(finite), ".", markersize=3, color=color, alpha=0.5)
    axes.errorbar(
      finite.mean(), at, xerr=finite.std() / np.sqrt(len(finite)), fmt="o", capsize=2, color=color
    )
  elif len(finite):
    axes.plot(finite, [at], "o", color=color)


def plot_predictors(
  frame: pd.DataFrame,
  correlations: pd.DataFrame | None = None,
  path: PathLike = "",
  lost: str = "loss_difference",
  predictors: Sequence[str] = (),
) -> Figure:
  """What was lost against each predictor: means over seeds by optimizer and learning rate, seeds as
  small points, and the rank correlation over optimizers with its interval.

  For the first recipe and method of the rows. predictors: columns of the frame; by default those of
  `correlations`."""
  pair = style.quantizations(frame)[0]
  rows = style.of_quantization(frame, pair)
  names = [name for name in predictors or _predictors(correlations) if rows[name].nunique() > 1]
  columns = min(3, max(1, len(names)))
  lines = max(1, -(-len(names) // columns))
  size = max(5.0, 3.1 * columns), 0.9 + 2.5 * lines
  with canvas(path, lines, columns, size, sharey=True) as (figure, axes_RxC):
    for axes, name in zip(axes_RxC.flat, names, strict=False):
      _scatter(axes, rows, name, lost)
      axes.set_title(f"{label(name)}{_worth(correlations, pair, name)}", fontsize=8)
    for axes in axes_RxC.flat[len(names) :]:
      axes.set_axis_off()
    if style.wide(rows[lost]):
      log_scale(axes_RxC[0, 0], "y")
    figure.supylabel(UNITS.get(lost, lost), fontsize=9)
    figure.suptitle(", ".join(map(label, pair)), fontsize=9.5, x=0.01, ha="left")
    optimizer_legend(figure, rows["optimizer"])
  return figure


def _predictors(correlations: pd.DataFrame | None) -> list[str]:
  return [] if correlations is None else list(dict.fromkeys(correlations["predictor"]))


def _scatter(axes: Axes, rows: pd.DataFrame, predictor: str, lost: str) -> None:
  for (name, _), sweep in rows.groupby(["optimizer", "learning_rate"]):
    own, color = sweep[[predictor, lost]].apply(pd.to_numeric, errors="coerce"), color_of(str(name))
    own = own[np.isfinite(own).all(axis=1)]
    if len(own) > 1:
      axes.plot(own[predictor], own[lost], ".", markersize=3, alpha=0.5, color=color)
    axes.plot(own[predictor].mean(), own[lost].mean(), "o", color=color)
  if style.wide(rows[predictor]):
    log_scale(axes, "x")
  else:
    axes.locator_params(axis="x", nbins=5)


def _worth(correlations: pd.DataFrame | None, pair: tuple[str, str], predictor: str) -> str:
  """The rank correlation with its interval, to follow a predictor's name."""
  if correlations is None:
    return ""
  own = style.of_quantization(correlations, pair)
  own = own[own["predictor"] == predictor]
  if own.empty or not np.isfinite(own["spearman"].iloc[0]):
    return ""
  value, low, high = (own[f"spearman{end}"].iloc[0] for end in ("", "_low", "_high"))
  return f": {value:+.2f} ({low:+.2f} to {high:+.2f})"


def plot_by_learning_rate(
  frame: pd.DataFrame, path: PathLike = "", lost: str = "loss_difference"
) -> Figure:
  """The loss in full precision by learning rate, and what was lost, one panel per recipe and
  method: a line per optimizer, means over seeds, with a ring at the rate of its least loss.

  frame: rows of `predictors.frame` with `but=("learning_rate",)`."""
  panels = [("full_precision_loss", "in full precision", frame.drop_duplicates("run"))]
  for pair in style.quantizations(frame):
    panels.append((lost, ", ".join(map(label, pair)), style.of_quantization(frame, pair)))
  best: dict[str, Any] = {}
  with canvas(path, 1, len(panels), (3.0 * len(panels), 3.4)) as (figure, (axes_C,)):
    for axes, (column, title, rows) in zip(axes_C, panels, strict=True):
      means = style.over_seeds(rows, ["optimizer", "learning_rate"], column)
      means = means[np.isfinite(means["mean"])].sort_values("learning_rate")
      for name in in_order(means["optimizer"]):
        own = means[means["optimizer"] == name].set_index("learning_rate")["mean"]
        best.setdefault(name, own.idxmin())  # from the first panel
        axes.plot(own.index, own, ".-", color=color_of(name))
        ring = own[own.index == best[name]]
        axes.plot(ring.index, ring, "o", markersize=9, fillstyle="none", color=color_of(name))
      axes.set(title=title, xlabel="learning rate")
      log_scale(axes, "x")
      if column == lost and means["mean"].min() > 0:
        log_scale(axes, "y")
    axes_C[0].set_ylabel("loss (nats)")
    if len(panels) > 1:
      axes_C[1].set_ylabel(UNITS.get(lost, lost))
    optimizer_legend(figure, frame["optimizer"])
  return figure


def plot_landings(compared: LandingComparison, path: PathLike = "") -> Figure:
  """What quantization costs each optimizer by its way to the common loss: means over seeds ±
  standard errors, one line per optimizer. One panel per recipe and method, two at most."""
  pairs = style.quantizations(compared.means)[:2]
  ways = [way for way in WAYS if (compared.means["way"] == way).any()]
  with canvas(path, 1, len(pairs), (4.8 * max(len(pairs), 1.2), 3.6)) as (figure, (axes_C,)):
    for axes, pair in zip(axes_C, pairs, strict=True):
      rows = style.of_quantization(compared.means, pair)
      names = in_order(rows["optimizer"])
      for name, offset in zip(names, style.beside(len(names), 0.2), strict=True):
        own = rows[rows["optimizer"] == name].set_index("way").reindex(ways).dropna(subset="value")
        at = [ways.index(way) + offset for way in own.index]
        error = own["value_stderr"].fillna(0)
        axes.errorbar(at, own["value"], yerr=error, fmt="o-", capsize=2, color=color_of(name))
      axes.set_xticks(range(len(ways)), ways)
      axes.set(xlim=(-0.4, len(ways) - 0.6), title=", ".join(map(label, pair)))
    axes_C[0].set(ylabel=UNITS.get(compared.metric, compared.metric))
    optimizer_legend(figure, compared.means["optimizer"])
  return figure
