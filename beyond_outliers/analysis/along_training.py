"""What quantization costs the checkpoints of a run, along its schedule.

arXiv 2510.06213 finds that delta, the relative increase of the loss by quantization, is flat while
the learning rate is constant, and jumps as the rate decays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from beyond_outliers import config, optim, quant
from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis import ptq_degradation
from beyond_outliers.analysis.statistics import estimate
from beyond_outliers.analysis.tuning import FULL_PRECISION
from beyond_outliers.errors import ConfigError
from beyond_outliers.types import PathLike

COLUMNS = (
  *("optimizer", "seed", "run", "recipe", "method", "average", "learning_rate", "steps", "step"),
  *("fraction", "rate", "loss", "quantized_loss", "delta"),
)
VARIES = ("step", "average")  # what the cells of one run may differ in
AT_PEAK = 1 - 1e-6  # share of the peak rate from which on it counts: schedules are float32


def schedule_position(c: config.Config, step: int) -> tuple[float, float]:
  """(fraction of the run completed after a step, that step's learning rate over the peak rate), as
  in metrics.jsonl if no updates were skipped."""
  schedule = optim.SCHEDULES[c.schedule.name](c.schedule, 1.0, c.steps)
  return step / c.steps, float(np.asarray(schedule(step - 1)))


def frame(
  runs: Sequence[runs_lib.Run],
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> pd.DataFrame:
  """One row per cell quantized after training, for every checkpoint that was evaluated.

  Columns: COLUMNS; fraction and rate are those of `schedule_position`; loss (in full precision) and
  quantized_loss are in nats; delta is quantized_loss / loss - 1; average tells how weights were
  averaged, empty if they weren't: such cells are rows of their own. attrs["left_out"]: sentences on
  what is left out, and other caveats.
  settings, folders: see `ptq_degradation.degradation_cells`.
  Errors: ConfigError if no run has such a cell, and as `ptq_degradation.check_cells`."""
  found, said = ptq_degradation.find_cells(runs, settings, folders, but=VARIES)
  cells = ptq_degradation.cell_table(found)
  if not (cells.method != "none").any():
    in_full_precision = (
      run.name for run in runs if quant.recipes.name_of(run.config.quant) == FULL_PRECISION
    )
    raise ConfigError(
      f"runs: none of {len(runs)} has a quantized cell; measure some, at every checkpoint: "
      + ptq_degradation.evaluation_command(
        next(in_full_precision, "RUN"), step="all", settings=settings
      )
    )
  joined = ptq_degradation.beside_full_precision(cells)
  ptq_degradation.check_cells(joined, but=VARIES)
  configs = {run.name: run.config for run in runs}
  positions = [
    schedule_position(configs[run], step) for run, step in zip(joined.run, joined.step, strict=True)
  ]
  joined[["fraction", "rate"]] = np.array(positions).reshape(-1, 2)
  joined = joined.rename(
    columns={"loss": "quantized_loss", "full_precision_loss": "loss", "relative": "delta"}
  )
  order = ["recipe", "method", "average", "optimizer", "seed", "step"]
  along = joined[list(COLUMNS)].sort_values(order).reset_index(drop=True)
  along.attrs["left_out"] = said
  return along


def jump(frame: pd.DataFrame) -> pd.DataFrame:
  """How delta changes as the learning rate decays, from a table of `frame`: one row per (recipe,
  method, average, optimizer), with means over seeds and their standard errors.

  Columns: constant, the mean of delta over the checkpoints at the peak rate; change, delta at the
  last of these less that at the first, zero where delta is flat; end, delta after the last step;
  jump, end - constant, by seed; each with its `_stderr`, NaN for one seed; seeds, the number of
  runs with both; checkpoints, the largest number at the peak rate in one run; reason, why runs do
  not count."""
  keys = ["recipe", "method", "average", "optimizer"]
  rows = []
  for names, cells in frame.groupby(keys, sort=True):
    found, reasons = [], []
    for run, of_run in cells.sort_values("step").groupby("run"):
      flat, last = of_run.delta[of_run.rate > AT_PEAK], of_run.delta[of_run.step == of_run.steps]
      if len(flat) and len(last):
        change = flat.iloc[-1] - flat.iloc[0] if len(flat) > 1 else np.nan
        end = last.iloc[0]
        found.append((flat.mean(), change, end, end - flat.mean(), len(flat)))
      else:
        lacking = "at the peak learning rate" if not len(flat) else "of the last step"
        reasons.append(f"{run}: no cell {lacking}")
    row = dict(zip(keys, names, strict=True))
    values = np.array(found).reshape(-1, 5)
    for name, column in zip(("constant", "change", "end", "jump"), values.T[:4], strict=True):
      row[name], row[f"{name}_stderr"] = estimate(column) if len(column) else (np.nan, np.nan)
    row |= {"seeds": len(found), "checkpoints": int(values[:, 4].max(initial=0))}
    rows.append(row | {"reason": "; ".join(reasons)})
  return pd.DataFrame(rows)
