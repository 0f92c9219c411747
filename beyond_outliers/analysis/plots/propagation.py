"""Figures of error propagation, from rows by unit: optimizer, seed, recipe, method, name, kind, R,
A, B, C, gain, ... as `predictors.units` has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

# Networks of up to this many blocks are shown unit by unit; deeper ones block by block.
FEW_BLOCKS = 4
# The parts of an error, in colours that no optimizer has.
ERROR_PARTS = {
  "A": ("passed on, A", "#999999"),
  "B": ("added here, B", "#E69F00"),
  "C": ("2⟨a, b⟩, C", "#F0E442"),
}
ON_THE_WAY = r"layers/\d+/(?:attention|mlp/\w+|\w+_norm|\w+_add)"
LINEAR = r"layers/\d+/(?:attention|mlp)/(?:q|k|v|o|gate|up|down)"


def plot_error_along_depth(units: pd.DataFrame, path: PathLike = "") -> Figure:
  """R, the relative error of each unit's output, from the first block to the end of the network:
  means over seeds ± standard errors. One panel per recipe and method, four at most."""
  pairs = style.quantizations(units)[:4]
  names = _way(units, ON_THE_WAY)
  columns = min(2, len(pairs))
  rows = -(-len(pairs) // columns)
  size = max(6.4, 4.8 * columns), 0.8 + 3.2 * rows
  with canvas(path, rows, columns, size, sharex=True, sharey=True) as (figure, axes_RxC):
    for axes, pair in zip(axes_RxC.flat, pairs, strict=False):
      means = _means(style.of_quantization(units, pair), names, "R")
      offsets = _offsets(means["optimizer"], 0.0 if len(names) > 30 else 0.3)
      for name, offset in offsets.items():
        own = means[means["optimizer"] == name]
        at = [names.index(unit) + offset for unit in own["name"]]
        axes.errorbar(
          at, own["mean"], yerr=own["sem"].fillna(0), fmt="o-", markersize=3, linewidth=1,
          color=color_of(name),
        )  # fmt: skip
      axes.set(title=", ".join(map(label, pair)))
      _mark_blocks(axes, names)
      log_scale(axes, "y")
    for axes in axes_RxC[:, 0]:
      axes.set(ylabel="R = ‖error‖²/‖output‖²")
    for axes in axes_RxC.flat[len(pairs) :]:
      axes.set_axis_off()
    optimizer_legend(figure, units["optimizer"])
  return figure


def plot_error_parts(units: pd.DataFrame, path: PathLike = "") -> Figure:
  """A, B and C, as shares of R, at the quantized units along depth: which part of an error came in,
  and which was added. One panel per optimizer, for the first recipe and method of the rows."""
  pair = style.quantizations(units)[0]
  rows = style.of_quantization(units, pair)
  names, optimizers = _way(rows, LINEAR), in_order(rows["optimizer"])
  columns = min(3, len(optimizers))
  lines = -(-len(optimizers) // columns)
  size = max(5.0, 3.2 * columns), 1.1 + 2.3 * lines
  with canvas(path, lines, columns, size, sharex=True, sharey=True) as (figure, axes_RxC):
    for axes, optimizer in zip(axes_RxC.flat, optimizers, strict=False):
      own = rows[rows["optimizer"] == optimizer]
      _stack(axes, own, names)
      axes.set_title(label(optimizer), color=color_of(optimizer), fontweight="bold")
      _mark_blocks(axes, names)
    for axes in axes_RxC[:, 0]:
      axes.set(ylabel="share of R")
    for axes in axes_RxC.flat[len(optimizers) :]:
      axes.set_axis_off()
    figure.suptitle(", ".join(map(label, pair)), fontsize=9.5, x=0.01, ha="left")
    marks = {text: {"color": color, "linewidth": 6} for text, color in ERROR_PARTS.values()}
    optimizer_legend(figure, [], marks)
  return figure


def _stack(axes: Axes, own: pd.DataFrame, names: Sequence[str]) -> None:
  """Stacked bars of the parts, negative ones downwards."""
  R = pd.to_numeric(own["R"], errors="coerce")
  above, below = np.zeros(len(names)), np.zeros(len(names))
  for part, (_, color) in ERROR_PARTS.items():
    shares = (pd.to_numeric(own[part], errors="coerce") / R).groupby(own["name"]).mean()
    values = shares.reindex(list(names)).fillna(0).to_numpy()
    bottom = np.where(values < 0, below, above)
    axes.bar(range(len(names)), values, 0.8, bottom=bottom, color=color, linewidth=0)
    above += np.maximum(values, 0)
    below += np.minimum(values, 0)
  axes.axhline(0, color="black", linewidth=0.8)


def plot_gains(units: pd.DataFrame, path: PathLike = "") -> Figure:
  """What kinds of units do to the incoming error: gain A / R_in (filled; its closed form open), and
  for linear layers the alignment ratio; means over depth and seeds, with the range.

  For the first recipe and method of the rows."""
  pair = style.quantizations(units)[0]
  rows = style.of_quantization(units, pair)
  rows = rows.assign(
    at=rows["name"].str.replace(r"^layers/\d+/?", "", regex=True).replace("", "block")
  )
  known = rows["at"][pd.to_numeric(rows["gain"], errors="coerce").notna()]
  names = [name for name in dict.fromkeys(rows["at"]) if name in set(known)]
  size = 9, 1.6 + 0.32 * len(names)
  with canvas(path, 1, 2, size, sharey=True) as (figure, (panels,)):
    _draw_gains(panels[0], rows, names, "gain")
    _draw_gains(panels[0], rows, names, "predicted_gain", filled=False)
    _draw_gains(panels[1], rows, names, "alignment_ratio")
    panels[0].set(xlabel="gain A / R_in", title=", ".join(map(label, pair)))
    panels[1].set(xlabel="alignment ratio (cos φ / cos ψ)²", title="linear layers")
    panels[0].set_yticks(range(len(names)), [label(name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for axes in panels:
      axes.axvline(1, color="black", linewidth=0.8)
      log_scale(axes, "x")
    optimizer_legend(
      figure,
      rows["optimizer"],
      {
        "measured": {"marker": "o", "linestyle": ""},
        "closed form": {"marker": "o", "linestyle": "", "markerfacecolor": "white"},
      },
    )
  return figure


def _draw_gains(
  axes: Axes, rows: pd.DataFrame, names: Sequence[str], column: str, filled: bool = True
) -> None:
  """Means by optimizer in each unit's row; filled ones with their range."""
  rows = rows.assign(value=pd.to_numeric(rows[column], errors="coerce"))
  rows = rows[rows["value"] > 0]
  for optimizer, offset in _offsets(rows["optimizer"], 0.6).items():
    own = rows[rows["optimizer"] == optimizer].groupby("at", sort=False)["value"]
    means = own.mean()
    at = np.array([names.index(name) + offset for name in means.index])
    color = color_of(optimizer)
    if filled:
      axes.hlines(at, own.min(), own.max(), color=color, linewidth=1, alpha=0.5)
    face = color if filled else "white"
    axes.plot(means, at, "o", markersize=4, color=color, markerfacecolor=face)


def _means(rows: pd.DataFrame, names: Sequence[str], column: str) -> pd.DataFrame:
  """Means over seeds by optimizer and unit, in the order of `names`."""
  rows = rows[rows["name"].isin(names)]
  means = style.over_seeds(rows, ["optimizer", "name"], column)
  place = {name: at for at, name in enumerate(names)}
  return means.sort_values("name", key=lambda column: column.map(place), kind="stable")


def _offsets(optimizers: pd.Series, spread: float) -> dict[str, float]:
  """Offsets of each optimizer's marks, so that they don't overlap."""
  names = in_order(optimizers)
  return dict(zip(names, style.beside(len(names), spread), strict=True))


def _way(units: pd.DataFrame, wanted: str) -> list[str]:
  """Names of the units along depth, in execution order: those that match, or the blocks of a deep
  network; and for ON_THE_WAY also the final norm and the head."""
  names = units["name"].drop_duplicates()
  blocks = names[names.str.fullmatch(r"layers/\d+")]
  ends = names[names.isin(["final_norm", "head"])] if wanted == ON_THE_WAY else names[:0]
  within = names[names.str.fullmatch(wanted)]
  deep = len(blocks) > FEW_BLOCKS
  return [*(blocks if deep else within), *ends]


def _mark_blocks(axes: Axes, names: Sequence[str]) -> None:
  """Ticks with the units' names, and lines between blocks."""
  parts = [name.removeprefix("layers/").split("/", 1) for name in names]
  deep = all(len(part) == 1 for part in parts)
  texts = [part[0] if deep else part[-1] for part in parts]
  every = -(-len(texts) // 26)
  texts = [
    text if at % every == 0 or (deep and not text.isdigit()) else ""
    for at, text in enumerate(texts)
  ]
  upright = all(text.isdigit() for text in texts) and len(names) < 16
  axes.set_xticks(range(len(names)), texts, rotation=0 if upright else 90)
  axes.grid(visible=False, axis="x")
  if deep:
    axes.set_xlabel("block")
    return
  axes.grid(axis="x", alpha=0.12)
  for at in range(1, len(parts)):
    if parts[at][0] != parts[at - 1][0] and parts[at - 1][0].isdigit():
      axes.axvline(at - 0.5, color="black", linewidth=0.8, linestyle=":")
