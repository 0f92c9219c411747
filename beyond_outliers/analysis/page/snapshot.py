"""Runs frozen at one moment, since they may go on while a report is written."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd

from beyond_outliers import runs as runs_lib


def _once(of_run: Any) -> Any:
  """A property of runs, made to be read once."""
  return functools.cached_property(of_run.fget)


class Snapshot(runs_lib.Run):
  """A run whose files are read once, so that the whole report is of one state of it."""

  manifest = _once(runs_lib.Run.manifest)
  status = _once(runs_lib.Run.status)
  steps = _once(runs_lib.Run.steps)
  identity = _once(runs_lib.Run.identity)
  trained_on = _once(runs_lib.Run.trained_on)
  parameter_counts = _once(runs_lib.Run.parameter_counts)

  def metrics(self) -> pd.DataFrame:
    return self._metrics

  @functools.cached_property
  def _metrics(self) -> pd.DataFrame:
    return super().metrics()
