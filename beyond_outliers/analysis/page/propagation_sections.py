"""Sections on error propagation: its growth along depth, its parts, and units' effect on it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers.analysis import plots
from beyond_outliers.analysis.page.evidence import Evidence, RunGroup
from beyond_outliers.analysis.page.quantization_sections import apart, missing
from beyond_outliers.analysis.page.section import Drawing, Part, Table, frame_table, unique
from beyond_outliers.analysis.page.text import EVALUATE, NOTHING, with_error
from beyond_outliers.analysis.plots import style


def error_along_depth(evidence: Evidence, group: RunGroup) -> Part:
  """How the error grows from the first block to the end of the network."""
  units = _finite(group.units.value)
  if not len(units):
    return _undecomposed(group)
  ends = units[units["name"].isin(["final_norm", "head"])]
  means = style.over_seeds(ends, ["recipe", "method", "optimizer", "name"], "R")
  wide = means.pivot_table(
    index=["recipe", "method", "optimizer"], columns="name", values=["mean", "sem"], dropna=False
  )
  rows = pd.DataFrame(
    [
      {
        **dict(zip(("recipe", "method", "optimizer"), key, strict=True)),
        **{
          f"{end}{suffix}": wide.loc[key].get((kind, end), float("nan"))
          for end in ("final_norm", "head")
          for kind, suffix in (("mean", ""), ("sem", "_se"))
        },
      }
      for key in wide.index
      if wide.loc[key, "mean"].notna().any()
    ]
  ).sort_values(["recipe", "method", "final_norm"])
  table = frame_table(
    f"final_error.{group.name}",
    "Error at the end of the network, mean over tokens of ‖error‖²/‖output‖²; over seeds ± "
    "standard errors. Smallest first.",
    rows,
    {
      "recipe": lambda row: str(row.recipe),
      "method": lambda row: str(row.method),
      "optimizer": lambda row: row.optimizer,
      "R_L, final norm": lambda row: with_error(row.final_norm, row.final_norm_se),
      "R, logits": lambda row: with_error(row.head, row.head_se),
    },
  )
  figure = Drawing(
    f"error_along_depth.{group.name}",
    "R, the mean over tokens of ‖error‖²/‖output‖², of each layer's, norm's and sum's output from "
    "the first block to the logits (head), on a logarithmic axis; of deep networks that of blocks.",
    functools.partial(plots.plot_error_along_depth, units),
  )
  return _decomposed(group, [figure], [table])


def error_parts(evidence: Evidence, group: RunGroup) -> Part:
  """Which part of each unit's error came in, and which was added."""
  units = _finite(group.units.value)
  if not len(units):
    return _undecomposed(group)
  figures = _per_quantization(
    units,
    f"error_parts.{group.name}",
    "Shares of R in the quantized linear layers (of deep networks: in blocks). A: the error that "
    "came in, as the layer passes it on. B: what quantizing the layer itself adds. C: twice the "
    "inner product of both; below zero where they cancel.",
    plots.plot_error_parts,
  )
  return _decomposed(group, figures, [])


def gains(evidence: Evidence, group: RunGroup) -> Part:
  """What each kind of unit does to the incoming error."""
  units = _finite(group.units.value)
  if not len(units):
    return _undecomposed(group)
  figures = _per_quantization(
    units,
    f"gains.{group.name}",
    "Left: gain of each kind of layer, by which it multiplies the error that comes in, measured, "
    "and by the closed form of linear layers. Right: alignment ratio, below 1 where the layer's "
    "weights pass on less of the error than of the signal. Means over depth and seeds; lines are "
    "the range.",
    plots.plot_gains,
  )
  return _decomposed(group, figures, [_gain_table(f"gains.{group.name}", units)])


def _gain_table(name: str, units: pd.DataFrame) -> Table:
  """A row per recipe, method and kind of unit, a column per optimizer."""
  kind = units["name"].str.replace(r"^layers/\d+/?", "", regex=True).replace("", "block")
  keys = ["recipe", "method", "unit", "optimizer"]
  columns = ["gain", "predicted_gain", "spectral_ratio", "alignment_ratio", "local"]
  means = units.assign(unit=kind).groupby(keys, sort=False)[columns].mean().reset_index()
  means = means[means["gain"].notna()]
  shown = pd.concat(apart(means)) if len(means) else means
  values = {tuple(row[:4]): row for row in style.named_rows(means)}

  def text(row: tuple[str, str, str], optimizer: str) -> str:
    value = values.get((*row, optimizer))
    if value is None:
      return NOTHING
    closed = "" if math.isnan(value.predicted_gain) else f" ({value.predicted_gain:.2f})"
    return f"{value.gain:.2f}{closed}"

  return Table(
    name,
    "Gain A / R_in, means over depth and seeds; in brackets the closed form of linear layers. The "
    "file has every method.",
    {
      **{key: functools.partial(_at, place=at) for at, key in enumerate(keys[:3])},
      **{
        optimizer: functools.partial(text, optimizer=optimizer)
        for optimizer in style.in_order(means["optimizer"])
      },
    },
    list(dict.fromkeys(zip(*(shown[key] for key in keys[:3]), strict=True))),
    means,
  )


def _finite(units: pd.DataFrame) -> pd.DataFrame:
  """The rows whose error is finite."""
  return units[np.isfinite(pd.to_numeric(units["R"], errors="coerce"))] if len(units) else units


def _at(row: Sequence[Any], place: int) -> str:
  return str(row[place])


def _per_quantization(
  units: pd.DataFrame, name: str, caption: str, plot: Callable[..., Any]
) -> list[Drawing]:
  return [
    Drawing(f"{name}.{at}", caption, functools.partial(plot, rows))
    for at, rows in enumerate(apart(units), 1)
  ]


def _decomposed(group: RunGroup, figures: Sequence[Drawing], tables: Sequence[Table]) -> Part:
  units, shown = group.units.value, set(_finite(group.units.value)["run"])
  broken = [f"{run}: its error is not finite" for run in unique(units["run"]) if run not in shown]
  return Part(
    group.title,
    len(shown),
    figures=figures,
    tables=tables,
    command=f"{EVALUATE} --propagation",
    left_out=[*units.attrs.get("left_out", []), *broken],
  )


def _undecomposed(group: RunGroup) -> Part:
  why = "no error is finite" if len(group.units.value) else "no cell's error was decomposed"
  return missing(group, group.units, why, f"{EVALUATE} --propagation")
