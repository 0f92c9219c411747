"""Sections on quantization after training: what it costs, how the error grows, what predicts it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from beyond_outliers.analysis import plots, predictors
from beyond_outliers.analysis.page.evidence import Evidence, Found, Group, attempt
from beyond_outliers.analysis.page.section import Drawing, Part, Table, frame_table
from beyond_outliers.analysis.page.text import EVALUATE, NOTHING, analysis_command, number, spread
from beyond_outliers.analysis.plots import style

LOST = "loss_difference"
# Predictors that have a panel each: of linear layers' inputs and the residual stream, and the error.
SHOWN = (
  *("max_to_median/linear", "max_to_mean/linear", "kurtosis/linear"),
  *("rms_kurtosis/residual", "outlier_channels/residual", "sqnr/linear"),
  *("R_L", "R_L_logits", "inherited"),
)
SEVERAL = 3  # recipes and methods that have a figure of their own, at most


def degradation(evidence: Evidence, group: Group) -> Part:
  """What quantization after training costs each optimizer, by recipe and method."""
  frame = group.cells.value
  measured = frame[pd.to_numeric(frame[LOST], errors="coerce").notna()] if LOST in frame else frame
  command = analysis_command(evidence.roots, f"--degradation={LOST}")
  if not len(measured):
    return _missing(group, group.cells, "no quantized cell", f"{EVALUATE} --methods=rtn,gptq")
  caption = (
    "Loss of the quantized model − in full precision, on the same tokens (nats): means over seeds ± "
    "standard errors; of one seed with the 95 % interval over documents. Best of each row in bold."
  )
  return Part(
    group.title,
    measured["run"].nunique(),
    figures=[
      Drawing(
        f"degradation.{group.name}",
        "Means over seeds ± standard errors; small points are seeds. The cheapest method on top.",
        functools.partial(plots.plot_degradation, measured),
      )
    ],
    tables=[_by_optimizer(f"degradation.{group.name}", caption, measured)],
    command=command,
    left_out=frame.attrs.get("left_out", []),
  )


def _by_optimizer(name: str, caption: str, frame: pd.DataFrame) -> Table:
  """A row per recipe and method, a column per optimizer."""
  optimizers = style.in_order(frame["optimizer"])
  means = style.over_seeds(frame, ["recipe", "method", "optimizer"], LOST)
  cells = {tuple(row[:3]): row for row in means.itertuples(index=False)}
  best = means.groupby(["recipe", "method"])["mean"].min()
  intervals = frame.get(f"{LOST}_interval", pd.Series(index=frame.index, dtype=object))
  keys = zip(frame["recipe"], frame["method"], frame["optimizer"], strict=True)
  of_documents = dict(zip(keys, intervals, strict=True))
  order = means.groupby(["recipe", "method"])["mean"].mean()
  pairs = sorted(order.index, key=lambda pair: (str(pair[0]), order[pair], str(pair[1])))

  def text(pair: tuple[str, str], optimizer: str) -> str:
    row = cells.get((*pair, optimizer))
    if row is None:
      return NOTHING
    shown = spread(row.mean, row.sem, 4, "+")
    interval = of_documents[(*pair, optimizer)]
    if row.count == 1 and isinstance(interval, list) and None not in interval:
      shown += f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"**{shown}**" if row.mean == best[pair] else shown

  columns: dict[str, Callable[[Any], str]] = {
    "recipe": lambda pair: str(pair[0]),
    "method": lambda pair: str(pair[1]),
    **{optimizer: functools.partial(text, optimizer=optimizer) for optimizer in optimizers},
  }
  kept = ["recipe", "method", "optimizer", "seed", LOST, "relative", "kl", "agreement", "run"]
  numbers = frame[[column for column in kept if column in frame]]
  return Table(name, caption, columns, pairs, numbers)


def error_along_depth(evidence: Evidence, group: Group) -> Part:
  """How the error grows from the first block to the end of the network."""
  units = group.units.value
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
    "Error at the end of the network, mean over tokens of ‖error‖²/‖output‖²; over seeds ± standard "
    "errors. Smallest first.",
    rows,
    {
      "recipe": lambda row: str(row.recipe),
      "method": lambda row: str(row.method),
      "optimizer": lambda row: row.optimizer,
      "R_L, final norm": lambda row: spread(row.final_norm, row.final_norm_se),
      "R, logits": lambda row: spread(row.head, row.head_se),
    },
  )
  figure = Drawing(
    f"error_along_depth.{group.name}",
    "R of each unit's output on the way through the network, on a logarithmic axis.",
    functools.partial(plots.plot_error_along_depth, units),
  )
  return _decomposed(group, [figure], [table])


def error_parts(evidence: Evidence, group: Group) -> Part:
  """What part of each unit's error came in, and what part was added."""
  units = group.units.value
  if not len(units):
    return _undecomposed(group)
  figures = _per_quantization(
    units,
    f"error_parts.{group.name}",
    "R = A + B + C of the quantized linear layers (of deep networks: of blocks), as shares of R.",
    plots.plot_error_parts,
  )
  return _decomposed(group, figures, [])


def gains(evidence: Evidence, group: Group) -> Part:
  """What kinds of units do to the error that comes in."""
  units = group.units.value
  if not len(units):
    return _undecomposed(group)
  figures = _per_quantization(
    units,
    f"gains.{group.name}",
    "Left: gain of each kind of unit, measured, and by the closed form of linear layers. Right: "
    "alignment ratio. Means over depth and seeds; lines are the range.",
    plots.plot_gains,
  )
  kind = units["name"].str.replace(r"^layers/\d+/?", "", regex=True).replace("", "block")
  columns = ["gain", "predicted_gain", "spectral_ratio", "alignment_ratio", "local"]
  numbers = units.assign(unit=kind, **{c: pd.to_numeric(units[c], errors="coerce") for c in columns})
  keys = ["recipe", "method", "unit", "optimizer"]
  rows = numbers.groupby(keys, sort=False)[columns].mean().reset_index()
  rows = rows[rows["gain"].notna()]
  table = frame_table(
    f"gains.{group.name}",
    "Means over depth and seeds. Spectral and alignment ratio, and their product, the closed form, "
    "are of linear layers.",
    rows,
    {
      **{key: functools.partial(_field, name=key) for key in keys},
      **{
        column.replace("_", " "): functools.partial(_number, name=column) for column in columns
      },
    },
  )
  return _decomposed(group, figures, [table])


def _field(row: Any, name: str) -> str:
  return str(getattr(row, name))


def _number(row: Any, name: str) -> str:
  return number(getattr(row, name), ".3g")


def predictors_of_degradation(evidence: Evidence, group: Group) -> Part:
  """What goes with degradation over optimizers: outliers, and the error at the network's end."""
  frame = group.cells.value
  if not len(frame):
    return _missing(group, group.cells, "no quantized cell", f"{EVALUATE} --propagation")
  judged = attempt(lambda: predictors.correlations(frame, LOST), pd.DataFrame())
  worth = judged.value
  if not len(worth) or not worth["spearman"].notna().any():
    why = judged.problem or "; ".join(dict.fromkeys(worth["reason"])) or "no predictor varies"
    return _missing(group, judged, why, f"{EVALUATE} --propagation")
  worth = worth[worth[["spearman", "pearson"]].notna().any(axis=1)]
  worth = worth.sort_values(
    ["recipe", "method", "spearman"], key=lambda c: -c.abs() if c.name == "spearman" else c
  )

  def coefficient(row: Any, name: str) -> str:
    value, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})" if value == value else NOTHING

  table = frame_table(
    f"predictors.{group.name}",
    "Correlation over optimizers (means over seeds) of what was lost with each predictor: value, "
    "95 % interval, exact p; `partial` is given the loss in full precision. Strongest first. p is of "
    "one predictor: of twenty that predict nothing, one is below .05.",
    worth,
    {
      "recipe": lambda row: str(row.recipe),
      "method": lambda row: str(row.method),
      "predictor": lambda row: str(row.predictor),
      "Spearman": functools.partial(coefficient, name="spearman"),
      "p": lambda row: number(row.spearman_p, ".3f"),
      "Pearson": functools.partial(coefficient, name="pearson"),
      "p ": lambda row: number(row.pearson_p, ".3f"),
      "partial Spearman": functools.partial(coefficient, name="partial_spearman"),
      "optimizers": lambda row: str(row.optimizers),
      "runs": lambda row: str(row.runs),
    },
  )
  figures = [
    Drawing(
      f"predictors.{group.name}.{at}",
      "What was lost against each predictor. Large: means over seeds; small: seeds. In brackets the "
      "95 % interval of Spearman's coefficient over optimizers.",
      functools.partial(
        plots.plot_predictors,
        rows,
        worth,
        predictors=[name for name in SHOWN if name in rows and rows[name].notna().any()],
      ),
    )
    for at, rows in enumerate(_apart(frame), 1)
  ]
  return Part(
    group.title,
    frame["run"].nunique(),
    figures=figures,
    tables=[table],
    command="analysis.predictors.correlations(analysis.predictors.frame(runs)), from Python",
    left_out=frame.attrs.get("left_out", []),
  )


def along_training(evidence: Evidence, group: Group) -> Part:
  """How degradation moves along a run, with the learning rate and its cool-down."""
  along = group.along.value
  if not len(along) or along["step"].nunique() < 2:
    why = "no run has cells of two checkpoints"
    return _missing(group, group.along, why, f"{EVALUATE} --steps=all")
  figure = Drawing(
    f"along_training.{group.name}",
    "Above: δ of every evaluated checkpoint; thin lines are runs, thick ones means over seeds. "
    "Below: the learning rate over its peak.",
    functools.partial(plots.plot_along_training, along),
  )
  keys = [name for name in ("recipe", "method", "average", "optimizer", "step") if name in along]
  rows = along.groupby([*keys, "fraction", "rate"], dropna=False)["delta"].agg(["mean", "sem"])
  rows = rows.reset_index().sort_values(keys)
  table = frame_table(
    f"along_training.{group.name}",
    "δ = CE(quantized)/CE − 1 in percent, means over seeds ± standard errors.",
    rows,
    {
      **{key: functools.partial(_field, name=key) for key in keys},
      "rate / peak": functools.partial(_number, name="rate"),
      "δ, %": lambda row: spread(100 * row.mean, 100 * row.sem, 2, "+"),
    },
  )
  return Part(
    group.title,
    along["run"].nunique(),
    figures=[figure],
    tables=[table],
    command="analysis.along_training.frame(runs), from Python",
    left_out=along.attrs.get("left_out", []),
  )


def _per_quantization(
  units: pd.DataFrame, name: str, caption: str, plot: Callable[..., Any]
) -> list[Drawing]:
  return [
    Drawing(f"{name}.{at}", caption, functools.partial(plot, rows))
    for at, rows in enumerate(_apart(units), 1)
  ]


def _apart(frame: pd.DataFrame) -> list[pd.DataFrame]:
  """The rows of each recipe and method, of SEVERAL at most."""
  return [style.of_quantization(frame, pair) for pair in style.quantizations(frame)[:SEVERAL]]


def _decomposed(group: Group, figures: Sequence[Drawing], tables: Sequence[Table]) -> Part:
  units = group.units.value
  return Part(
    group.title,
    units["run"].nunique(),
    figures=figures,
    tables=tables,
    command=f"{EVALUATE} --propagation",
    left_out=units.attrs.get("left_out", []),
  )


def _undecomposed(group: Group) -> Part:
  return _missing(group, group.units, "no cell's error was decomposed", f"{EVALUATE} --propagation")


def _missing(group: Group, found: Found[Any], why: str, command: str) -> Part:
  return Part(group.title, len(group.runs), missing=found.problem or why, command=command)
