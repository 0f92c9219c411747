"""Our train step beside its peers': bare JAX, torch eager and torch.compile; optimizers beside
theirs.

  python -m beyond_outliers.bench --peers [--only=50m_bfloat16,adamw] [--repeats=8] [--json]

Every contender of a row of steps is a program of its own, which waits to be told to take one. All
take one in each round, in alternating order, and a ratio is the median over rounds: what else the
machine does slows all of them. CPU seconds tell less of it still. `taskset -c 0` in front measures
one core. torch may be installed elsewhere: `--peer_python=/there/bin/python`; torch.compile needs a
C++ compiler.
Rows of optimizers are those of `bench --optimizers`, one process after the other, on one core.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from beyond_outliers import cli
from beyond_outliers.bench import optimizers
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.bench.timed_optimizers import TIMED_OPTIMIZERS
from beyond_outliers.config.files import standard_json
from beyond_outliers.types import Json


class Contender(NamedTuple):
  """One program of a row: a module of contenders/, and how it runs the step."""

  module: str
  recipe: str = "none"
  compiled: bool = False  # torch's


class Steps(NamedTuple):
  """A row whose contenders alternate. The first is ours, which the others' ratios are of."""

  size: str
  batch_size: int
  dtype: str
  contenders: Mapping[str, Contender]


# Where another interpreter finds the contender: the clone.
ROOT = str(pathlib.Path(__file__).parents[2])

PLAIN = {
  "ours": Contender("ours"),
  "bare JAX": Contender("bare"),
  "torch eager": Contender("torch_step"),
  "torch.compile": Contender("torch_step", compiled=True),
}
QUEST = {
  "ours": Contender("ours", "quest_w4a4"),
  "ours, plain": Contender("ours"),
  "torch eager": Contender("torch_step", "quest_w4a4"),
  "torch.compile": Contender("torch_step", "quest_w4a4", compiled=True),
  "torch.compile, plain": Contender("torch_step", compiled=True),
}

STEP_ROWS = {
  "50m_float32": Steps("50m", 2, "float32", PLAIN),
  "50m_bfloat16": Steps("50m", 2, "bfloat16", PLAIN),
  "quest_w4a4_float32": Steps("50m", 2, "float32", QUEST),
  "quest_w4a4_bfloat16": Steps("50m", 2, "bfloat16", QUEST),
}
OPTIMIZERS = {
  family.replace(" ", "_"): [name for name, row in TIMED_OPTIMIZERS.items() if row.family == family]
  for family in dict.fromkeys(row.family for row in TIMED_OPTIMIZERS.values())
}
HEAD = ("", "seconds", "ours / theirs", "of CPU time", "MiB", "ours / theirs", "loss")
ROWS = (*STEP_ROWS, *OPTIMIZERS)


def measure_peers(names: Iterable[str], repeats: int, peer_python: str) -> Json:
  """All figures, by row: of steps {contender: figures or {"failed": why}}, of optimizers what
  `measure_optimizers` returns.

  peer_python: the interpreter that torch's contenders run in."""
  result: Json = {"machine": machine(), "rows": {}}
  for name in names:
    if name in STEP_ROWS:
      figures = measure_steps(STEP_ROWS[name], repeats, peer_python)
    else:
      figures = optimizers.measure_optimizers(OPTIMIZERS[name], "full", repeats)
    print(f"{name}: {json.dumps(standard_json(figures))}", file=sys.stderr, flush=True)
    result["rows"][name] = figures
  return result


def machine() -> Json:
  """The processor's name, cores that this process may use, and the load of the last minute."""
  name = platform.processor()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as lines:
      name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {"processor": name, "cores": cores, "load": os.getloadavg()[0]}


def measure_steps(row: Steps, rounds: int, peer_python: str) -> Json:
  """{"contenders": {name: figures}, "load": at the end}.

  `ratio` and `cpu_ratio`, of ours to theirs: the median, least and largest over the rounds."""
  with tempfile.TemporaryDirectory() as folder:
    running: dict[str, Any] = {}
    found: Json = {}
    try:
      for name, contender in row.contenders.items():
        running[name] = _start(row, contender, peer_python, os.path.join(folder, name))
      for name, process in list(running.items()):
        if not _ready(process):  # compiling by turns would take longer
          running.pop(name).wait()
          found[name] = {"failed": _last_line(os.path.join(folder, name))}
      taken = alternate(running, rounds)
    finally:
      for process in running.values():
        process.stdin.close()
        process.wait()
  for name, steps in taken.items():
    found[name] = figures_of(steps, taken.get("ours"))
  return {"contenders": {name: found[name] for name in row.contenders}, "load": os.getloadavg()[0]}


def alternate(running: Mapping[str, Any], rounds: int) -> dict[str, list[Json]]:
  """The figures of every round by contender. Every second round goes backwards."""
  taken: dict[str, list[Json]] = {name: [] for name in running}
  for number in range(rounds):
    for name in list(running)[:: -1 if number % 2 else 1]:
      running[name].stdin.write("go\n")
      running[name].stdin.flush()
      taken[name].append(json.loads(running[name].stdout.readline()))
  return taken


def figures_of(steps: Sequence[Json], ours: Sequence[Json] | None) -> Json:
  """Figures of one contender from those of its rounds and of ours."""
  figures: Json = {
    "seconds": statistics.median(step["seconds"] for step in steps),
    "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps),
    "memory_bytes": max(step["memory_bytes"] for step in steps),
    "loss": steps[-1]["loss"],
  }
  if ours is not None:
    for ratio, figure in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
      all_rounds = [one[figure] / other[figure] for one, other in zip(ours, steps, strict=True)]
      figures[ratio] = [statistics.median(all_rounds), min(all_rounds), max(all_rounds)]
    figures["memory_ratio"] = max(s["memory_bytes"] for s in ours) / figures["memory_bytes"]
  return figures


def _start(row: Steps, contender: Contender, peer_python: str, errors: str) -> Any:
  c = study_config("adamw", f"{row.size},batch_size={row.batch_size},micro_batches=1")
  asked = {
    **{"size": row.size, "dtype": row.dtype, "recipe": contender.recipe},
    **{"batch_size": row.batch_size, "context": c.context, "compiled": contender.compiled},
    "model": dataclasses.asdict(c.model),
  }
  python = peer_python if contender.module == "torch_step" else sys.executable
  with open(errors, "w") as stderr:
    return subprocess.Popen(
      [python, "-m", f"beyond_outliers.bench.contenders.{contender.module}", json.dumps(asked)],
      env={**os.environ, "PYTHONPATH": ROOT} if python != sys.executable else None,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
    )


def _ready(process: Any) -> bool:
  return any(line == "ready\n" for line in iter(process.stdout.readline, ""))


def _last_line(path: str) -> str:
  with open(path) as stderr:
    return (stderr.read().strip().splitlines() or ["it ended without a word"])[-1]


def peers_table(result: Mapping[str, Any]) -> str:
  """A block of lines per row: seconds, and ours as multiples of each contender's."""
  m = result["machine"]
  lines = [f"{m['processor']} · {m['cores']} cores · load {m['load']:.1f}"]
  for name, row in result["rows"].items():
    lines.append("")
    if name in OPTIMIZERS:
      lines.append(optimizers.optimizers_table(row))
      continue
    lines.append(
      f"{name}, load {row['load']:.1f}; ours / theirs: median [least … largest] of rounds"
    )
    cells: list[Sequence[str]] = [HEAD]
    for contender, figures in row["contenders"].items():
      if "failed" in figures:
        cells.append((f"  {contender}", f"failed: {figures['failed']}", *[""] * 5))
      else:
        cells.append((f"  {contender}", *_cells(figures)))
    lines += cli.aligned(cells)
  return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
  def multiple(ratio: str) -> str:
    if ratio not in figures:
      return ""
    return "{:.2f} [{:.2f} … {:.2f}]".format(*figures[ratio])

  memory = f"{figures['memory_ratio']:.2f}" if "memory_ratio" in figures else ""
  return (
    f"{figures['seconds']:.2f}",
    multiple("ratio"),
    multiple("cpu_ratio"),
    f"{figures['memory_bytes'] / 2**20:,.0f}",
    memory,
    f"{figures['loss']:.3f}",
  )
