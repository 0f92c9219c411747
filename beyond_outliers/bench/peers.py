"""Our code against its peers: train steps against bare JAX and torch, data preparation against
tokenizers' libraries, scoring against lm-eval, GPTQ against llm-compressor, and optimizers.

  python -m beyond_outliers.bench --peers [--only=50m_bfloat16,gptq,adamw] [--repeats=8] [--json]

Each contender of a row is a separate program, which does the work once, compilation included, and
then waits for requests. In each round all contenders repeat it, in alternating order, and a ratio
is the median over rounds, so that other load on the machine slows all of them alike. CPU seconds
are affected even less. Prefix `taskset -c 0` to measure one core. torch and what needs it may be
installed elsewhere: `--peer_python=/there/bin/python`; torch.compile needs a C++ compiler. Rows of
optimizers are those of `bench --optimizers`, one process after the other, on one core.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from beyond_outliers import cli
from beyond_outliers.bench import optimizers, peer_works
from beyond_outliers.bench.peer_works import Contender, Work
from beyond_outliers.bench.timed_optimizers import TIMED_OPTIMIZERS
from beyond_outliers.config.files import standard_json
from beyond_outliers.types import Json

# The clone, in which another interpreter finds the contenders.
ROOT = str(pathlib.Path(__file__).parents[2])
OPTIMIZERS = {
  family.replace(" ", "_"): [name for name, row in TIMED_OPTIMIZERS.items() if row.family == family]
  for family in dict.fromkeys(row.family for row in TIMED_OPTIMIZERS.values())
}
HEAD = ("", "seconds", "ours / theirs", "of CPU time", "first", "", "MiB", "", "result")
ROWS = (*peer_works.WORKS, *OPTIMIZERS)


def measure_peers(names: Iterable[str], repeats: int, peer_python: str) -> Json:
  """All figures, by row: for pieces of work those of `measure_work`, for optimizers those of
  `measure_optimizers`.

  peer_python: the interpreter for contenders that need none of our dependencies."""
  result: Json = {"machine": machine(), "rows": {}}
  for name in names:
    if name in peer_works.WORKS:
      figures = measure_work(peer_works.WORKS[name], repeats, peer_python)
    else:
      figures = optimizers.measure_optimizers(OPTIMIZERS[name], "full", repeats)
    print(f"{name}: {json.dumps(standard_json(figures))}", file=sys.stderr, flush=True)
    result["rows"][name] = figures
  return result


def machine() -> Json:
  """The processor's name, the cores that this process may use, and the last minute's load."""
  name = platform.processor()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as lines:
      name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {"processor": name, "cores": cores, "load": os.getloadavg()[0]}


def measure_work(work: Work, rounds: int, peer_python: str) -> Json:
  """{"contenders": {name: figures, or {"failed": why}}, "load": at the end}.

  Figures `first_...` are of the first time, with each contender alone. `ratio` and `cpu_ratio` are
  ours over theirs: median, least and largest over the rounds."""
  with tempfile.TemporaryDirectory() as folder:
    asked = work.inputs(pathlib.Path(folder))
    running: dict[str, Any] = {}
    first: dict[str, Json] = {}
    found: Json = {}
    try:
      for name, contender in work.contenders.items():
        errors = os.path.join(folder, name)
        running[name] = _start(contender, asked, peer_python, errors)
        if line := _figures(running[name]):
          first[name] = line
      started = {name: running[name] for name in first}
      taken = alternate(started, min(rounds, work.rounds))
    finally:
      for process in running.values():
        with contextlib.suppress(BrokenPipeError):
          process.stdin.close()
        process.wait()
    for name in work.contenders.keys() - taken.keys():
      found[name] = {"failed": _last_line(os.path.join(folder, name))}
  for name, times in taken.items():
    ours = (first["ours"], taken["ours"]) if "ours" in taken else None
    found[name] = figures_of(first[name], times, ours)
  return {"contenders": {name: found[name] for name in work.contenders}, "load": os.getloadavg()[0]}


def alternate(running: Mapping[str, Any], rounds: int) -> dict[str, list[Json]]:
  """The figures of every round by contender, without contenders that ended early. Every second
  round goes in reverse order."""
  taken: dict[str, list[Json]] = {name: [] for name in running}
  for number in range(rounds):
    for name in list(taken)[:: -1 if number % 2 else 1]:
      if (figures := _next_round(running[name])) is None:
        del taken[name]
      else:
        taken[name].append(figures)
  return taken


def _next_round(process: Any) -> Json | None:
  with contextlib.suppress(BrokenPipeError):
    process.stdin.write("go\n")
    process.stdin.flush()
  return _figures(process)


def figures_of(
  first: Json, times: Sequence[Json], ours: tuple[Json, Sequence[Json]] | None
) -> Json:
  """Figures of one contender from its first time and its rounds, relative to ours."""
  figures: Json = {
    "seconds": statistics.median(each["seconds"] for each in times),
    "cpu_seconds": statistics.median(each["cpu_seconds"] for each in times),
    "first_seconds": first["seconds"],
    "memory_bytes": times[-1]["memory_bytes"],
    "result": times[-1]["result"],
  }
  if ours is not None:
    our_first, our_times = ours
    for ratio, figure in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
      all_rounds = [
        one[figure] / other[figure] for one, other in zip(our_times, times, strict=True)
      ]
      figures[ratio] = [statistics.median(all_rounds), min(all_rounds), max(all_rounds)]
    figures["first_ratio"] = our_first["seconds"] / first["seconds"]
    figures["memory_ratio"] = our_times[-1]["memory_bytes"] / figures["memory_bytes"]
  return figures


def _start(contender: Contender, asked: Json, peer_python: str, errors: str) -> Any:
  python = peer_python if contender.elsewhere else sys.executable
  told = json.dumps({**asked, **contender.told})
  with open(errors, "w") as stderr:
    return subprocess.Popen(
      [python, "-m", f"beyond_outliers.bench.contenders.{contender.module}", told],
      env={**os.environ, "PYTHONPATH": ROOT} if python != sys.executable else None,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
    )


def _figures(process: Any) -> Json | None:
  """The next figures that it prints, skipping its libraries' output; None if it has ended."""
  for line in iter(process.stdout.readline, ""):
    if line.startswith('{"seconds"'):
      return json.loads(line)
  return None


def _last_line(path: str) -> str:
  with open(path) as stderr:
    return (stderr.read().strip().splitlines() or ["it ended without a word"])[-1]


def peers_table(result: Mapping[str, Any]) -> str:
  """A block of lines per row: seconds, and ours over each contender's."""
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
        cells.append((f"  {contender}", f"failed: {figures['failed']}", *[""] * (len(HEAD) - 2)))
      else:
        cells.append((f"  {contender}", *_cells(figures)))
    lines += cli.aligned(cells)
  return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
  def multiple(ratio: str) -> str:
    if ratio not in figures:
      return ""
    return "{:.2f} [{:.2f} … {:.2f}]".format(*figures[ratio])

  def once(ratio: str) -> str:
    return f"× {figures[ratio]:.2f}" if ratio in figures else ""

  return (
    f"{figures['seconds']:.2f}",
    multiple("ratio"),
    multiple("cpu_ratio"),
    f"{figures['first_seconds']:.1f}",
    once("first_ratio"),
    f"{figures['memory_bytes'] / 2**20:,.0f}",
    once("memory_ratio"),
    f"{figures['result']:,.3f}",
  )
