"""Style of the figures: one colour per optimizer, black ink on white, text kept as text in SVG."""

from __future__ import annotations

import colorsys
import contextlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from matplotlib import colors, ticker
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from beyond_outliers.types import PathLike

# One colour per optimizer in every figure: Okabe and Ito's colour-blind safe palette. Its other two
# colours are for parts of an error.
COLORS = {
  "adamw": "#000000",
  "muon": "#0072B2",
  "psgd": "#CC79A7",
  "scion": "#56B4E9",
  "shampoo": "#D55E00",
  "soap": "#009E73",
}
LINES = ("-", "--", ":", "-.")  # for the first recipe, the second, ...
MARKERS = ("o", "s", "^", "D", "v", "P")
LONGEST = 32  # characters of a name in a figure

STYLE = {
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 9.5,
  "font.size": 9.0,
  "grid.alpha": 0.25,
  "legend.frameon": False,
  "lines.linewidth": 1.5,
  "lines.markersize": 5.0,
  "savefig.dpi": 130,
  # So that the same runs give the same bytes.
  "svg.fonttype": "none",
  "svg.hashsalt": "beyond_outliers",
  "text.parse_math": False,  # a $ in a name is a $
}
# Characters that XML cannot hold, but names in a file of results may.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@contextlib.contextmanager
def canvas(
  path: PathLike, rows: int, columns: int, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Figure, np.ndarray]]:
  """(a figure, its axes [rows, columns]) to draw on; at the end it is written to the path, if there
  is one.

  size: inches. options: of pyplot.subplots."""
  with plt.rc_context(STYLE):
    figure, axes = plt.subplots(
      rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    try:
      yield figure, axes
      if path:
        _write(figure, path)
    finally:
      plt.close(figure)  # or a notebook would show it twice


def is_writable(path: PathLike) -> bool:
  """Whether figures can be written as files with this name's suffix."""
  suffix = os.path.splitext(path)[1].lower()
  return suffix.removeprefix(".") in FigureCanvasBase.get_supported_filetypes()


def _write(figure: Figure, path: PathLike) -> None:
  if os.path.splitext(path)[1].lower() != ".svg":
    figure.savefig(path)
    return
  text = io.StringIO()
  figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
  epath.Path(path).write_text(NO_XML.sub("\ufffd", text.getvalue()))


def color_of(optimizer: str) -> str:
  """An optimizer's colour; if COLORS has none, a muted one derived from its name."""
  hue = zlib.crc32(optimizer.encode(errors="replace")) % 360 / 360
  return COLORS.get(optimizer) or colors.to_hex(colorsys.hsv_to_rgb(hue, 0.5, 0.7))


def in_order(optimizers: Iterable[str]) -> list[str]:
  """The optimizers, each once, in the order of all figures and tables: as COLORS, then by name."""
  known = list(COLORS)
  return sorted(
    set(optimizers), key=lambda name: (known.index(name) if name in known else 99, name)
  )


def label(name: object) -> str:
  """A name, shortened to fit a figure."""
  text = str(name)
  return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def optimizer_legend(
  figure: Figure, optimizers: Iterable[str], others: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
  """Legend below the axes: the optimizers' colours, and `others`, {text: style of its line}."""
  handles = [
    Line2D([], [], color=color_of(name), linewidth=3, label=label(name))
    for name in in_order(optimizers)
  ]
  for text, style in (others or {}).items():
    options: dict[str, Any] = {"color": "black", **style}
    handles.append(Line2D([], [], label=label(text), **options))
  width = figure.get_figwidth()
  figure.legend(handles=handles, loc="outside lower center", ncols=max(2, int(width / 1.05)))


def log_scale(axes: Axes, which: str) -> None:
  """A logarithmic axis with plain numbers at its ticks; which: x or y."""
  axes.set(**{f"{which}scale": "log"})
  axis = axes.xaxis if which == "x" else axes.yaxis
  axes.autoscale_view()
  low, high = axis.get_view_interval()
  # Within a decade or two, powers of ten alone would give one tick, or none.
  subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 300 * low else (1.0,)
  axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
  axis.set_major_formatter(ticker.FuncFormatter(_plain))
  axis.set_minor_formatter(ticker.NullFormatter())


def _plain(value: float, position: int | None) -> str:
  return f"{value:g}"


def wide(values: Sequence[float] | np.ndarray | pd.Series) -> bool:
  """Whether values are positive and span so much that a logarithmic axis shows them better."""
  found = np.asarray(values, float)
  found = found[np.isfinite(found)]
  return bool(len(found) and found.min() > 0 and found.max() > 20 * found.min())


def beside(count: int, spread: float) -> list[float]:
  """Offsets of several marks, so that they lie side by side."""
  return np.linspace(-spread / 2, spread / 2, count).tolist() if count > 1 else [0.0]


def named_rows(frame: pd.DataFrame) -> list[Any]:
  """The rows as named tuples."""
  return list(frame.itertuples(index=False))


def over_seeds(frame: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
  """mean, sem and count of a column over the rows of each group, in order of first appearance."""
  values = pd.to_numeric(frame[column], errors="coerce")
  groups = values.groupby([frame[name] for name in by], sort=False)
  return groups.agg(["mean", "sem", "count"]).reset_index()


def quantizations(frame: pd.DataFrame) -> list[tuple[str, str]]:
  """The pairs (recipe, method) of a frame, the study's first: round to nearest at W4A4."""
  pairs = set(zip(frame["recipe"], frame["method"], strict=True))
  return sorted(pairs, key=lambda pair: (pair != ("rtn_w4a4", "rtn"), *map(str, pair)))


def of_quantization(frame: pd.DataFrame, pair: tuple[str, str]) -> pd.DataFrame:
  """The rows of one pair (recipe, method)."""
  return frame[(frame["recipe"] == pair[0]) & (frame["method"] == pair[1])]
