"""Live table of the runs in a pool, on a terminal."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from launch import pool

REDRAW_SECONDS = 1.0
TAIL_BYTES = 1 << 16  # of metrics.jsonl, enough for its last rows


@contextlib.contextmanager
def live(runner: pool.Pool, wanted: bool) -> Iterator[Callable[[], None]]:
  """Context with a table of running jobs on the terminal, below the pool's lines; yields a function
  that redraws it. Without a terminal, or if not `wanted`, that does nothing."""
  if not wanted or not sys.stdout.isatty():
    yield lambda: None
    return
  from rich.console import Console  # installed with flax
  from rich.live import Live

  console, drawn = Console(), 0.0
  with Live(console=console, auto_refresh=False, transient=True) as shown:
    plain = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
    runner.say = lambda text: console.print(text, **plain)

    def look() -> None:
      nonlocal drawn
      if time.monotonic() - drawn > REDRAW_SECONDS:
        shown.update(_table(rows(runner.tasks), summary(runner.tasks)), refresh=True)
        drawn = time.monotonic()

    yield look


def _table(found: list[tuple[str, ...]], caption: str):
  from rich.table import Table
  from rich.text import Text

  made = Table("job", "step", "loss", "tokens/s", "time", caption=caption, expand=True)
  for row in found:
    made.add_row(*map(Text, row))
  return made


def summary(tasks: list[pool.Task]) -> str:
  """How many jobs are over, failed, running and to go."""
  running = sum(task.running for task in tasks)
  over = sum(task.over for task in tasks)
  failed = sum(not pool.well(task) for task in tasks if task.over)
  left = len(tasks) - over - running
  return f"{over} over, {failed} of them failed · {running} running · {left} to go"


def rows(tasks: list[pool.Task]) -> list[tuple[str, ...]]:
  """One row per running job: name, step, loss, tokens per second, time."""
  found: list[tuple[str, ...]] = []
  for task in tasks:
    if task.running:
      spent = datetime.timedelta(seconds=round(time.monotonic() - task.began))
      figures = progress(task.job.workdir) if task.job.kind == "train" else ("", "", "")
      found.append((task.job.name, *figures, str(spent)))
  return found


def progress(workdir: str) -> tuple[str, str, str]:
  """(step/steps, loss, tokens per second) of a run's newest row; "" for what is missing."""
  try:
    with open(os.path.join(workdir, "metrics.jsonl"), "rb") as file:
      file.seek(max(0, os.path.getsize(file.name) - TAIL_BYTES))
      whole = file.read().split(b"\n")[:-1]
    row = json.loads([line for line in whole if b'"train/loss"' in line][-1])
    with open(os.path.join(workdir, "config.json"), "rb") as file:
      steps = json.load(file)["steps"]
  except (OSError, ValueError, LookupError):  # files or rows are not there yet
    return "", "", ""
  loss, speed = row.get("train/loss"), row.get("tokens_per_second")
  return (
    f"{row['step']}/{steps}",
    f"{loss:.4f}" if isinstance(loss, float) else "",
    f"{speed:,.0f}" if isinstance(speed, float) else "",
  )
