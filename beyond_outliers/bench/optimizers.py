"""Times of an optimizer's step alone, and of its peers' on PyPI, on one CPU core.

  python -m beyond_outliers.bench --optimizers [--tree=small] [--only=shampoo,torch_dash]
                                  [--repeats=40] [--json]

Each row of TIMED_OPTIMIZERS runs in its own process, one after the other, so that neither memory
nor caches are shared. Missing peers are named; `pip install 'beyond_outliers[peers]'` installs them
all. Compare only figures of one run.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from beyond_outliers.bench import floors, kernels
from beyond_outliers.bench.timed_optimizers import TIMED_OPTIMIZERS, JaxSteps, TimedOptimizer
from beyond_outliers.bench.torch_optimizers import EMBEDDING
from beyond_outliers.config.files import standard_json
from beyond_outliers.types import Json

# Steps that are not timed, in which memory is first touched and the first bases are computed.
WARM_UP = 3
GRADIENTS = 4  # different ones, used in turn, so that statistics have full rank
FIGURES = ("ordinary_seconds", "slowest_seconds", "amortised_seconds")
HEAD = (
  *("ordinary", "× best"),
  *("slowest", "× best"),
  *("amortised", "× best", "floor", "× floor"),
  *("slow/ord", "state B/p", "compile s"),
)

Shapes = Mapping[str, tuple[int, ...]]


def transformer_tree(
  width: int, squares: int, others: int, vocabulary: int = 0
) -> dict[str, tuple[int, ...]]:
  """Shapes of a transformer's matrices: square, 3 times as wide, 3 times as tall, an embedding."""
  return {
    **{f"square_{i}": (width, width) for i in range(squares)},
    **{f"wide_{i}": (width, 3 * width) for i in range(others)},
    **{f"tall_{i}": (3 * width, width) for i in range(others)},
    **({EMBEDDING: (vocabulary, width)} if vocabulary else {}),
  }


TREES: dict[str, Shapes] = {
  "full": transformer_tree(768, squares=12, others=4, vocabulary=8192),
  "small": transformer_tree(768, squares=2, others=1),
}


def measure_optimizer(row: TimedOptimizer, shapes: Shapes, repeats: int) -> Json:
  """Figures of one row, measured in this process: seconds, bytes.

  At least `repeats` steps, in whole periods, are timed, and the median is taken for each step of a
  period. Over a period, ordinary is the median of these, slowest the largest, amortised the mean.
  Compiling includes tracing. Rows of this package also have the floor of an amortised step
  (bench/floors.py).
  Errors: FloatingPointError if the parameters are not finite at the end, which makes times
    meaningless."""
  draw = np.random.default_rng(0)

  def tree(scale: float) -> dict[str, np.ndarray]:
    return {name: scale * draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}

  params = tree(0.02)
  steps = row.steps(row.make, params, [tree(0.01) for _ in range(GRADIENTS)])
  for number in range(WARM_UP):
    steps.step(number)
  periods = -(-repeats // row.period)
  times = np.reshape(
    [steps.step(WARM_UP + number) for number in range(periods * row.period)], (periods, row.period)
  )
  if not steps.finite():
    raise FloatingPointError("the parameters are not finite")
  of_steps = np.median(times, axis=0)
  ours = row.steps is JaxSteps and not row.peer
  return {
    "ordinary_seconds": float(np.median(of_steps)),
    "slowest_seconds": float(of_steps.max()),
    "amortised_seconds": float(of_steps.mean()),
    "compile_seconds": steps.compile_seconds,
    "state_bytes_per_parameter": steps.state_bytes / sum(map(math.prod, shapes.values())),
    **(
      {"floor_seconds": floors.floor_seconds(row.make(), params, row.period, repeats)}
      if ours
      else {}
    ),
  }


def measure_optimizers(names: Iterable[str], tree: str, repeats: int) -> Json:
  """All figures, by row; for a row that did not run, the reason.

  {"rows": {name: figures of `measure_optimizer`, or {"missing": how to install it}, or {"failed":
  why}}, ...}."""
  result: Json = {
    "tree": tree,
    "parameters": sum(map(math.prod, TREES[tree].values())),
    "repeats": repeats,
    "versions": versions(),
    "kernels": in_process("kernels", tree, repeats),
    "rows": {},
  }
  if "failed" in result["kernels"]:
    raise RuntimeError("a process could not time the kernels: " + result["kernels"]["failed"])
  for name in names:
    peer = TIMED_OPTIMIZERS[name].peer
    missing = peer and peer not in result["versions"]
    figures = {"missing": f"pip install {peer}"} if missing else in_process(name, tree, repeats)
    print(f"{name}: {json.dumps(standard_json(figures))}", file=sys.stderr, flush=True)
    result["rows"][name] = figures
  return result


def versions() -> dict[str, str]:
  """Versions of JAX and of the installed peers."""
  found = {}
  for name in sorted({"jax"} | {row.peer for row in TIMED_OPTIMIZERS.values() if row.peer}):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def in_process(*arguments: Any) -> Json:
  """Figures that `print_figures` prints in its own process, or {"failed": its last error line}."""
  one_thread = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  process = subprocess.run(
    [sys.executable, "-m", "beyond_outliers.bench.optimizers", *map(str, arguments)],
    env={**os.environ, **one_thread},
    capture_output=True,
    text=True,
  )
  if process.returncode:
    return {
      "failed": (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    }
  return json.loads(process.stdout.splitlines()[-1])


def print_figures(name: str, tree: str, repeats: str) -> None:
  """Prints a row's figures, or those of "kernels", as a line of JSON."""
  if hasattr(os, "sched_setaffinity"):  # before JAX and torch start threads, which inherit it
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  print(
    json.dumps(
      kernels.measure_kernels(int(repeats))
      if name == "kernels"
      else measure_optimizer(TIMED_OPTIMIZERS[name], TREES[tree], int(repeats))
    )
  )


def best_of_peers(rows: Mapping[str, Mapping[str, Any]], family: str) -> dict[str, float]:
  """Least value of each figure over a family's peers; empty if none ran."""
  peers = [
    row
    for name, row in rows.items()
    if TIMED_OPTIMIZERS[name].family == family and TIMED_OPTIMIZERS[name].peer and FIGURES[0] in row
  ]
  return {figure: min(row[figure] for row in peers) for figure in FIGURES} if peers else {}


def optimizers_table(result: Mapping[str, Any]) -> str:
  """Milliseconds of a step by family, also as multiples of the best peer's; and ours as multiples
  of the floor of an amortised step."""
  alone = [f"{name} {1e3 * seconds:,.1f} ms" for name, seconds in result["kernels"].items()]
  lines = [
    f"tree {result['tree']}: {result['parameters']:,} parameters · one core · ms per step",
    "with " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    "kernels: " + " · ".join(alone),
    "",
    _line("", HEAD),
  ]
  family = ""
  for name, row in result["rows"].items():
    if TIMED_OPTIMIZERS[name].family != family:
      family = TIMED_OPTIMIZERS[name].family
      lines.append(family)
    if FIGURES[0] in row:
      lines.append(_line(f"  {name}", _cells(row, best_of_peers(result["rows"], family))))
    else:
      lines += [f"  {name:<22}{what}: {text}" for what, text in row.items()]
  return "\n".join(lines)


def _line(name: str, cells: Iterable[str]) -> str:
  return f"{name:<22}" + "".join(f"{cell:>11}" for cell in cells)


def _cells(row: Mapping[str, Any], best: Mapping[str, float]) -> list[str]:
  """Cells under HEAD; empty in the columns of the best peer or the floor if there is none."""
  cells = []
  for figure in FIGURES:
    multiple = f"{row[figure] / best[figure]:.2f}" if best else ""
    cells += [f"{1e3 * row[figure]:,.1f}", multiple]
  floor, compiled = row.get("floor_seconds"), row["compile_seconds"]
  return [
    *cells,
    *([f"{1e3 * floor:,.1f}", f"{row['amortised_seconds'] / floor:.2f}"] if floor else ["", ""]),
    f"{row['slowest_seconds'] / row['ordinary_seconds']:.2f}",
    f"{row['state_bytes_per_parameter']:.2f}",
    "" if compiled is None else f"{compiled:.1f}",
  ]


if __name__ == "__main__":
  print_figures(*sys.argv[1:])
