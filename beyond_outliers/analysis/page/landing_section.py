"""Section on the common loss: how each optimizer comes to it, and whether that matters."""

from __future__ import annotations

import functools

import pandas as pd

from beyond_outliers.analysis import plots, tables
from beyond_outliers.analysis.page.evidence import Evidence, RunGroup
from beyond_outliers.analysis.page.section import Drawing, Part, Table, frame_table
from beyond_outliers.analysis.page.text import analysis_command, field, listed, with_error
from beyond_outliers.analysis.plots.style import named_rows

KEYS = ("recipe", "method", "way", "optimizer")


def landings(evidence: Evidence, group: RunGroup) -> Part:
  """How each optimizer comes to the common loss, and whether their order depends on it."""
  loss, found = group.landings.value
  command = analysis_command(evidence.roots_of(group), "--common_loss", "--overrides=common.json")
  if not found:
    return Part(group.title, len(group.runs), missing=group.landings.problem, command=command)
  numbers = pd.DataFrame(
    [
      {
        "optimizer": x.optimizer,
        "way": way,
        "step": point.step,
        "loss": point.loss,
        "off": point.loss - loss,
      }
      for x in found
      for way in ("best", "ending", "evaluation", "checkpoint", "crossing")
      if (point := getattr(x, way))
    ]
  )
  tables_made = [
    Table(
      f"common_loss.{group.name}",
      f"Common loss {loss:.4f} nats, the worst of the optimizers' best losses in full precision; "
      "and by optimizer validation losses close to it (nats), each at its step.",
      tables.landing_columns(loss),
      found,
      numbers,
    )
  ]
  without = [f"Without {listed(group.not_landed)}, of which no run is done."] * bool(
    group.not_landed
  )
  compared = group.landing_costs
  if compared.value is None or not len(compared.value.means):
    why = compared.problem or "none of these checkpoints was quantized and evaluated"
    return Part(
      group.title,
      len(group.runs) + len(group.shorter),
      [*without, f"What quantization costs there: {why}."],
      tables=tables_made,
      command=command,
      left_out=compared.value.missing if compared.value else [],
    )
  costs = compared.value
  columns = {
    **{
      name: functools.partial(field, name=name) for name in ("recipe", "method", "way", "optimizer")
    },
    "step": lambda row: f"{row.step:d}",
    "loss − common loss": lambda row: f"{row.off:+.4f}",
    "cost (nats)": lambda row: with_error(row.value, row.value_stderr, 4, "+"),
    "place": lambda row: f"{row.place:g}",
  }
  rows = costs.means.sort_values(["recipe", "method", "way", "place"])
  name = f"landings.{group.name}"
  caption = (
    "What quantization costs each optimizer at the common loss, by its way there; place 1 is the "
    "cheapest. Loss − common loss: how far from it that model is (nats)."
  )
  tables_made.append(frame_table(name, caption, rows, columns))
  sentences = [
    f"{row.recipe}, {row.method}: from {row.way} to {row.other}, the order of {row.optimizers} "
    + (f"optimizers changes: {row.exchanged}." if row.changes else "optimizers stays.")
    for row in named_rows(costs.orders)
  ]
  several = costs.means.groupby(["recipe", "method"])["optimizer"].nunique().max() > 1
  figure = Drawing(
    name,
    "Re-run: trained again for fewer steps, with a cool-down of its own. Nearest: the nearest "
    "checkpoint of the full run. Crossing: its first checkpoint below the common loss.",
    functools.partial(plots.plot_landings, costs),
  )
  return Part(
    group.title,
    costs.values["run"].nunique(),
    [*without, *sentences],
    [figure] if several else [],
    tables_made,
    command=f"analysis.landings.compare_landings(runs{group.cell_arguments}), from Python",
    left_out=costs.missing,
  )
