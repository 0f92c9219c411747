"""Section on the common loss: how each optimizer reaches it, and whether that matters."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pandas as pd

from beyond_outliers.analysis import plots, tables
from beyond_outliers.analysis.common_loss import Landing
from beyond_outliers.analysis.landings import LandingComparison
from beyond_outliers.analysis.page.evidence import Evidence, RunGroup
from beyond_outliers.analysis.page.section import Drawing, Part, Table, frame_table
from beyond_outliers.analysis.page.text import analysis_command, field, listed, with_error
from beyond_outliers.analysis.plots.style import named_rows

KEYS = ("recipe", "method", "way", "optimizer")  # first columns of a table of costs


def landings(evidence: Evidence, group: RunGroup) -> Part:
  """How each optimizer reaches the common loss, and whether their order depends on it."""
  loss, found = group.landings.value
  command = analysis_command(evidence.roots_of(group), "--common_loss", "--overrides=common.json")
  if not found:
    return Part(group.title, len(group.runs), missing=group.landings.problem, command=command)
  ways = _ways_table(group.name, found, loss)
  sentences = (
    [f"Without {listed(group.not_landed)}, of which no run is done."] if group.not_landed else []
  )
  costs, problem = group.landing_costs.value, group.landing_costs.problem
  if costs is None or costs.means.empty:
    why = problem or "none of these checkpoints was quantized and evaluated"
    return Part(
      group.title,
      len(group.runs) + len(group.shorter),
      [*sentences, f"What quantization costs there: {why}."],
      tables=[ways],
      command=command,
      left_out=costs.missing if costs else [],
    )
  several = costs.means.groupby(["recipe", "method"])["optimizer"].nunique().max() > 1
  figure = Drawing(
    f"landings.{group.name}",
    "Re-run: trained again for fewer steps, with a cool-down of its own. Nearest: the nearest "
    "checkpoint of the full run. Crossing: its first checkpoint below the common loss.",
    functools.partial(plots.plot_landings, costs),
  )
  return Part(
    group.title,
    costs.values["run"].nunique(),
    [*sentences, *_orders(costs)],
    [figure] if several else [],
    [ways, _costs_table(group.name, costs)],
    command=f"analysis.landings.compare_landings(runs{group.cell_arguments}), from Python",
    left_out=costs.missing,
  )


def _ways_table(name: str, found: Sequence[Landing], loss: float) -> Table:
  """Each optimizer's losses close to the common one, each with its step."""
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
  return Table(
    f"common_loss.{name}",
    f"Common loss {loss:.4f} nats, the worst of the optimizers' best losses in full precision; "
    "and by optimizer validation losses close to it (nats), each at its step.",
    tables.landing_columns(loss),
    found,
    numbers,
  )


def _costs_table(name: str, costs: LandingComparison) -> Table:
  """What quantization costs each optimizer, by its way to the common loss."""
  columns = {
    **{key: functools.partial(field, name=key) for key in KEYS},
    "step": lambda row: f"{row.step:d}",
    "loss − common loss": lambda row: f"{row.off:+.4f}",
    "cost (nats)": lambda row: with_error(row.value, row.value_stderr, 4, "+"),
    "place": lambda row: f"{row.place:g}",
  }
  caption = (
    "What quantization costs each optimizer at the common loss, by its way there; place 1 is the "
    "cheapest. Loss − common loss: how far from it that model is (nats)."
  )
  rows = costs.means.sort_values(["recipe", "method", "way", "place"])
  return frame_table(f"landings.{name}", caption, rows, columns)


def _orders(costs: LandingComparison) -> list[str]:
  """Sentences on whether the order of optimizers changes from one way to another."""
  return [
    f"{row.recipe}, {row.method}: from {row.way} to {row.other}, the order of {row.optimizers} "
    + (f"optimizers changes: {row.exchanged}." if row.changes else "optimizers stays.")
    for row in named_rows(costs.orders)
  ]
