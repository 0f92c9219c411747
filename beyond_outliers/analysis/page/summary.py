"""The first section, what quantization costs each optimizer, and the last, what was left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from beyond_outliers.analysis.page.evidence import Evidence, RunGroup
from beyond_outliers.analysis.page.section import PageSection, Part, Table, frame_table, unique
from beyond_outliers.analysis.page.text import NOTHING, analysis_command, extremes, with_error
from beyond_outliers.analysis.plots import style
from beyond_outliers.analysis.statistics import Estimate, estimate
from beyond_outliers.analysis.tuning import final_metric, standing

CHEAPEST = 3  # columns of quantization after training: round to nearest and the cheapest others

Column = dict[str, Estimate]  # by optimizer


def answer(evidence: Evidence, group: RunGroup) -> Part:
  """One row per optimizer: its loss, the cost of training under each recipe and of quantization
  after training, the error at the network's end, and rho."""
  columns = {**_losses(group), **_gaps(group), **_methods(group), **_error(group), **_rho(evidence)}
  if not any(columns.values()):
    why = group.tunings.problem or "no run is done"
    command = analysis_command(evidence.roots_of(group))
    return Part(group.title, len(group.runs), missing=why, command=command)
  sentences = [
    f"{heading}: {text}."
    for heading, found in columns.items()
    if heading.startswith(("QAT", "PTQ"))
    and (text := extremes({name: value.mean for name, value in found.items()}, "nats"))
  ]
  seeds = {run.config.seed for run in group.best}
  if len(seeds) == 1:
    sentences.append("One seed: differences of a few hundredths of a nat are not resolved.")
  return Part(
    group.title,
    len(group.runs),
    sentences,
    tables=[_answer_table(f"answer.{group.name}", columns)],
    command=analysis_command(evidence.roots, *group.cell_flags, "--out=report"),
  )


def _answer_table(name: str, columns: dict[str, Column]) -> Table:
  """One row per optimizer, in order of the first column."""
  optimizers = style.in_order(name for found in columns.values() for name in found)
  first = next(iter(columns.values()))
  optimizers.sort(key=lambda name: first[name].mean if name in first else math.inf)
  rows = pd.DataFrame(
    [
      {
        "optimizer": name,
        **{
          f"{heading}{end}": getattr(found[name], of) if name in found else math.nan
          for heading, found in columns.items()
          for end, of in (("", "mean"), (" ±", "stderr"))
        },
      }
      for name in optimizers
    ]
  )
  caption = (
    "Means over seeds ± standard errors, at each optimizer's best rate in full precision; lowest "
    "loss first, the least of each column in bold. Losses in nats; QAT: loss of the run under the "
    "recipe − in full precision; PTQ: of the quantized model − of the model in full precision."
  )
  shown = {heading: _texts(heading, found) for heading, found in columns.items()}
  return frame_table(name, caption, rows, {"optimizer": lambda row: row[0], **shown})


def _texts(heading: str, found: Column) -> Callable[[Any], str]:
  """A function from a row, which begins with an optimizer, to its text in this column."""
  digits = 3 if heading.startswith(("R_L", "rho")) else 4
  sign = "+" if heading.startswith(("QAT", "PTQ")) else ""
  least = min((value.mean for value in found.values()), default=math.nan)

  def text(row: Any) -> str:
    value = found.get(row[0])
    if value is None:
      return NOTHING
    shown = with_error(value.mean, value.stderr, digits, sign)
    bold = value.mean == least and len(found) > 1 and not heading.startswith("rho")
    return f"**{shown}**" if bold else shown

  return text


def _losses(group: RunGroup) -> dict[str, Column]:
  by_optimizer: dict[str, list[float]] = {}
  for run in group.best:
    loss = final_metric(run, "eval/loss")
    if math.isfinite(loss):
      by_optimizer.setdefault(run.config.optimizer.name, []).append(loss)
  found = {name: estimate(losses) for name, losses in by_optimizer.items()}
  return {"loss, full precision": found} if found else {}


def _gaps(group: RunGroup) -> dict[str, Column]:
  found: dict[str, Column] = {}
  for gap in group.gaps.value[0]:
    found.setdefault(f"QAT, {gap.recipe}", {})[gap.optimizer] = gap.loss
  return found


def _methods(group: RunGroup) -> dict[str, Column]:
  frame = group.cells.value
  if "loss_difference" not in frame:
    return {}
  means = style.over_seeds(frame, ["recipe", "method", "optimizer"], "loss_difference")
  first, *others = style.quantizations(frame)
  order = means.groupby(["recipe", "method"])["mean"].mean()
  cheapest = sorted((pair for pair in others if pair[0] == first[0]), key=lambda pair: order[pair])
  return {
    f"PTQ, {recipe}, {method}": _column(style.of_quantization(means, (recipe, method)))
    for recipe, method in [first, *cheapest[: CHEAPEST - 1]]
  }


def _error(group: RunGroup) -> dict[str, Column]:
  frame = group.cells.value
  if "R_L" not in frame or frame["R_L"].isna().all():
    return {}
  recipe, method = style.quantizations(frame[frame["R_L"].notna()])[0]
  own = style.of_quantization(frame, (recipe, method))
  return {f"R_L, {recipe}, {method}": _column(style.over_seeds(own, ["optimizer"], "R_L"))}


def _column(means: pd.DataFrame) -> Column:
  return {
    row.optimizer: Estimate(row.mean, row.sem)
    for row in style.named_rows(means)
    if not math.isnan(row.mean)
  }


def _rho(evidence: Evidence) -> dict[str, Column]:
  found: dict[str, Column] = {}
  for law in evidence.laws if len(evidence.laws) == 1 else ():
    fit = law.law.value
    rhos, identified = (fit.rho, fit.identified) if fit else ({}, {})
    for (optimizer, recipe), rho in rhos.items():
      if isinstance(rho, float) and identified.get(f"rho({optimizer}, {recipe})"):
        found.setdefault(f"rho, {recipe}", {})[optimizer] = Estimate(rho, math.nan)
  return found


def left_out(evidence: Evidence, made: Sequence[PageSection]) -> Part:
  """All that is in no number: runs that cannot be read or are not done, and what sections lack."""
  rows = [{"of": "the report", "what": line} for line in evidence.unread]
  for section in made:
    for part in section.parts:
      lines = [*part.left_out, *([part.missing] if part.missing else [])]
      of = section.title + (f", {part.heading}" if len(section.parts) > 1 else "")
      rows += [{"of": of, "what": line} for line in lines]
  mentioned = " ".join(row["what"] for row in rows)
  for run in evidence.runs:
    if run.status["status"] != "done" and run.name not in mentioned:
      rows.append({"of": "all means", "what": standing(run)})
  if not rows:
    return Part(sentences=["Nothing is missing, and nothing was left out."])
  by_line: dict[str, list[str]] = {}
  for row in rows:
    by_line.setdefault(row["what"], []).append(row["of"])
  frame = pd.DataFrame(
    [{"what": what, "of": "; ".join(unique(of))} for what, of in by_line.items()]
  )
  shown = {"what": lambda row: row.what, "is not in": lambda row: row.of}
  words = "A cell is one evaluation: of a checkpoint, quantized under a recipe by a method."
  return Part(sentences=[words], tables=[frame_table("left_out", "", frame, shown)])
