"""Sections on what was trained: runs, learning rates, losses, gaps under recipes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import plots, tables
from beyond_outliers.analysis.page.evidence import (
  Evidence,
  RunGroup,
  attempt,
  parameters,
  recipe_of,
)
from beyond_outliers.analysis.page.section import (
  Drawing,
  Part,
  Table,
  comparison_numbers,
  frame_table,
)
from beyond_outliers.analysis.page.text import NOTHING, analysis_command, rates, text_columns
from beyond_outliers.analysis.qat_gap import Gap, compare_gaps, gaps_at_own_rates
from beyond_outliers.analysis.tuning import Tuning, final_metric, judged_without, not_done

RUN_COLUMNS = (
  *("run", "size", "optimizer", "recipe", "learning rate", "seed", "steps", "status", "at step"),
  *("validation loss", "reason"),
)
NEIGHBOURS = ("next lower rate", "next higher rate")  # columns for sweeps of several rates
STATUSES = ("done", "running", "preempted", "diverged", "failed", "not started")


def what_was_run(evidence: Evidence, group: RunGroup) -> Part:
  """How many runs there are by optimizer and recipe, and a list of those that are not done."""
  every = [*group.runs, *group.shorter]
  frame = runs_table(every)
  keys = ["optimizer", "recipe", "steps"]
  rows = [_sweep(dict(zip(keys, key, strict=True)), own) for key, own in frame.groupby(keys)]
  sweeps = pd.DataFrame(rows).sort_values(["recipe", "optimizer", "steps"], kind="stable")
  shown = text_columns(
    sweeps, {**dict.fromkeys(sweeps.columns), **dict.fromkeys(("steps", "runs", *STATUSES), "d")}
  )
  shown = {name: text for name, text in shown.items() if name not in STATUSES or sweeps[name].any()}
  unfinished = frame[frame["status"] != "done"]
  found = [
    frame_table(
      f"runs.{group.name}",
      "Sweeps: each optimizer's learning rates and seeds under a recipe, and how the runs ended.",
      sweeps,
      shown,
    )
  ]
  if len(unfinished):
    found.append(
      frame_table(
        f"runs_not_done.{group.name}",
        "Runs that are not done. They count as an infinite loss, and are in no mean.",
        unfinished,
        _run_columns(unfinished, evidence.roots),
      )
    )
  c = group.runs[0].config
  data, total = group.runs[0].trained_on, parameters(group.runs[0])
  blocks = f"{c.model.blocks} block{'s' * (c.model.blocks != 1)}"
  sentences = [
    f"Model of {blocks}, width {c.model.d_model}, vocabulary {c.model.vocab}"
    + (f", {total:,} parameters" if total else "")
    + f". Trained on {group.extent}, in batches of {c.batch_size} windows of {c.context} tokens. "
    f"Data: {c.data.source}, fingerprint {data['fingerprint'][:12]}, tokenizer "
    f"{data['tokenizer'][:12]}."
  ]
  if group.apart:
    sentences.append(f"These are a part of their own: {group.apart}.")
  if group.shorter:
    steps = sorted({run.config.steps for run in group.shorter})
    sentences.append(f"Shorter runs, of {steps} steps, are on the way to the common loss.")
  return Part(group.title, len(every), sentences, tables=found)


def _sweep(key: dict[str, object], own: pd.DataFrame) -> dict[str, object]:
  return {
    **key,
    "runs": len(own),
    "learning rates": rates(own["learning rate"]),
    "seeds": ", ".join(str(seed) for seed in sorted(set(own["seed"]))),
    **{status: int((own["status"] == status).sum()) for status in STATUSES},
  }


def runs_table(runs: list[runs_lib.Run]) -> pd.DataFrame:
  """One row per run, with RUN_COLUMNS."""
  rows = []
  for run in runs:
    c, status = run.config, run.status
    loss = final_metric(run, "eval/loss")
    swept = c.optimizer.name, recipe_of(run), c.optimizer.learning_rate, c.seed, c.steps
    ended = status["status"], status["step"], loss if math.isfinite(loss) else math.nan
    rows.append((run.name, c.size, *swept, *ended, status["reason"]))
  return pd.DataFrame(rows, columns=list(RUN_COLUMNS))


def _run_columns(frame: pd.DataFrame, roots: Sequence[str]) -> dict[str, Callable[[Any], str]]:
  """Columns of a table of runs. roots: if there is one, runs are named by their path below it."""
  styles = {
    **dict.fromkeys(("optimizer", "recipe")),
    **{"learning rate": "g", "seed": "d", "steps": "d", "status": None, "at step": "d"},
    **{"validation loss": ".4f", "reason": None, "run": None},
  }
  if not frame["reason"].map(bool).any():
    styles.pop("reason")
  if frame["validation loss"].isna().all():
    styles.pop("validation loss")
  prefix = f"{os.path.abspath(roots[0])}/" if len(roots) == 1 else ""
  named = {"run": lambda row: row.run.removeprefix(prefix)}
  return {**text_columns(frame, styles), **named}


def every_run(evidence: Evidence) -> Table:
  """The full list of the runs that figures and tables are made from."""
  frame = runs_table(list(evidence.runs))
  frame = frame.sort_values(["size", "optimizer", "recipe", "learning rate", "seed", "run"])
  return frame_table(
    "every_run", "All runs of this report.", frame, _run_columns(frame, evidence.roots)
  )


def tuned_rates(evidence: Evidence, group: RunGroup) -> Part:
  """Each optimizer's best rate and its neighbours, and whether the grid brackets it."""
  found = group.tunings.value
  command = analysis_command(evidence.roots_of(group))
  if not found:
    return Part(group.title, len(group.runs), missing=group.tunings.problem, command=command)
  numbers = pd.DataFrame(
    [
      {"recipe": t.recipe, "optimizer": t.optimizer, "learning rate": rate, "loss": loss}
      for t in found
      for rate, loss in t.losses.items()
    ]
  )
  several = len({t.recipe for t in found}) > 1
  shown = {"recipe": lambda t: t.recipe} if several else {}
  shown |= {name: functools.partial(_tuned, text=of) for name, of in tables.TUNING_COLUMNS.items()}
  if all(len(t.losses) == 1 for t in found):
    shown = {name: text for name, text in shown.items() if name not in NEIGHBOURS}
  caption = (
    "Best learning rate of each sweep, by the mean validation loss over seeds after the last step "
    f"(nats); {NOTHING} where a run is not done, or its loss not finite. Skipped updates: not "
    "finite. Roots kept: times that a preconditioner kept its old root, as the new one was not "
    "finite or not exact. Counts and seconds are of the seed with the most."
  )
  made = [Table(f"tuning.{group.name}", caption, shown, found, numbers)]
  again = tables.retuned(found)
  if again:
    caption = (
      "Rates tuned under a recipe against those of full precision; losses under the recipe (nats)."
    )
    frame = pd.DataFrame(
      [
        {
          "optimizer": t.optimizer,
          "recipe": t.recipe,
          "learning rate": t.learning_rate,
          "loss": t.loss,
        }
        for t in again
      ]
    )
    columns = tables.retuning_columns(found)
    made.append(Table(f"retuning.{group.name}", caption, columns, again, frame))
  edges = [
    f"{t.optimizer} ({t.recipe}) {t.learning_rate:g}"
    for t in found
    if t.at_the_edge and len(t.losses) > 1
  ]
  sentences = (
    [f"On the edge of its grid, which is to be widened: {', '.join(edges)}."] if edges else []
  )
  alone = [f"{t.optimizer} ({t.recipe})" for t in found if len(t.losses) == 1]
  if alone:
    sentences.append(f"Trained at one rate only, so not tuned: {', '.join(alone)}.")
  sentences += [f"{line[0].upper()}{line[1:]}." for line in judged_without(found)]
  if unfinished := not_done(group.runs):
    sentences.append(f"Not done: {'; '.join(unfinished)}.")
  return Part(group.title, len(group.runs), sentences, tables=made, command=command)


def _tuned(t: Tuning, text: Callable[[Tuning], str]) -> str:
  """A column's text; an infinite loss or count stands for none."""
  return text(t).replace("inf", NOTHING)


def loss_curves(evidence: Evidence, group: RunGroup) -> Part:
  """How the losses fall, and how they depend on the learning rate."""
  command = analysis_command(evidence.roots_of(group), "--plot=curves.png")
  drawn = [t for t in group.tunings.value if _has_curve(t)]
  if not any(math.isfinite(t.loss) for t in drawn):
    why = group.tunings.problem or "no learning rate has all its runs done"
    return Part(group.title, len(group.runs), missing=why, command=command)
  figure = Drawing(
    f"loss_curves.{group.name}",
    "Left: the run of the lowest seed at each optimizer's best rate. Right: validation loss after "
    "the last step by rate, means over seeds; a rate at which a run did not finish has no point.",
    functools.partial(plots.plot_loss_curves, drawn),
  )
  return Part(group.title, len(group.runs), figures=[figure], command=command)


def _has_curve(t: Tuning) -> bool:
  """Whether the first of the best runs has logged losses."""
  run = t.best[0]
  known = attempt(lambda: set(run.metrics().columns), set()).value
  return {"train/loss", "eval/loss"} <= known


def training_gap(evidence: Evidence, group: RunGroup) -> Part:
  """What training under a recipe costs each optimizer."""
  gaps, left_out = group.gaps.value
  if not gaps:
    return Part(
      group.title,
      len(group.runs),
      missing=group.gaps.problem
      or "no optimizer has a run done in full precision and one under a recipe with the same seed",
      command="python -m launch.local --config=configs/adamw_qat.py --root=RUNS "
      "--overrides=tuned.json",
      left_out=left_out,
    )
  caption = (
    "Validation loss after the last step: means over seeds ± standard errors, the gap's of "
    "differences paired by seed. Smallest gap first."
  )
  own = f"Each side at the learning rate that is best for it. {caption}"
  return Part(
    group.title,
    len(group.runs),
    figures=[
      Drawing(
        f"gaps.{group.name}",
        "Each optimizer in full precision and under every recipe, and the gap.",
        functools.partial(plots.plot_qat_gaps, gaps),
      )
    ],
    tables=[
      *_gap_tables("gaps", group.name, caption, gaps),
      *_gap_tables("own_gaps", group.name, own, gaps_at_own_rates(group.runs, gaps)),
    ],
    command=analysis_command(evidence.roots_of(group), "--gap_plot=gap.png"),
    left_out=left_out,
  )


def _gap_tables(kind: str, name: str, caption: str, gaps: Sequence[Gap]) -> list[Table]:
  """Tables of gaps, and of those that seeds tell apart, unless all are of one seed."""
  if not gaps:
    return []
  numbers = pd.DataFrame(
    [
      {
        "optimizer": gap.optimizer,
        "recipe": gap.recipe,
        "seed": seed,
        "rate": gap.rates[0],
        "rate under the recipe": gap.rates[1],
        "loss": gap.losses[0][at],
        "loss under the recipe": gap.losses[1][at],
      }
      for gap in gaps
      for at, seed in enumerate(gap.seeds)
    ]
  )
  made = [Table(f"{kind}.{name}", caption, tables.GAP_COLUMNS, gaps, numbers)]
  if compared := compare_gaps(gaps):
    numbers = comparison_numbers(["recipe", "gap", "nats"], compared)
    caption = (
      "Which gaps seeds tell from none, and from each other: paired by seed, intervals and p of "
      "Student's t after Holm's correction, over the gaps and over the pairs."
    )
    columns = tables.GAP_COMPARISON_COLUMNS
    made.append(Table(f"{kind}_compared.{name}", caption, columns, compared, numbers))
  return made
