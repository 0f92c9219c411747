"""Benches. What a step costs on this machine, and where its time and memory go:

  python -m beyond_outliers.bench --config=configs/adamw.py:nano [--json]

What an optimizer's update alone costs: timed against its peers (bench/optimizers.py), or counted
without running it (bench/update_cost.py):

  python -m beyond_outliers.bench --optimizers           milliseconds on one core
  python -m beyond_outliers.bench --on_paper=760m        FLOPs, state and traffic per device
  python -m beyond_outliers.bench --collectives=50m      bytes between devices, as compiled

What whole steps would take on 8, 64 and 256 devices (bench/scaling.py):

  python -m beyond_outliers.bench --scaling=50m --only=shampoo/none/64

What quantization costs: in training, relative to full precision (bench/recipes.py), and after
training, method by method (bench/ptq.py):

  python -m beyond_outliers.bench --recipes              a linear layer, and whole models
  python -m beyond_outliers.bench --ptq=50m              seconds and memory

What it costs to decompose a quantized model's error (bench/propagation.py):

  python -m beyond_outliers.bench --propagation=50m      seconds and memory

How fast zero-shot questions are scored (bench/scoring.py):

  python -m beyond_outliers.bench --scoring=nano

What a run does between its steps (bench/loop.py):

  python -m beyond_outliers.bench --loop=nano            host time per step, and of saving

Whether an accelerator computes correctly, and how close it gets to its peak (bench/accelerator/):

  python -m beyond_outliers.bench --accelerator --out=DIR

How our code compares with other libraries (bench/peers.py):

  python -m beyond_outliers.bench --peers --only=50m_bfloat16

Every time is a median over the repeats of one run: compare figures within a run, not across days.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from absl import app, flags

from beyond_outliers import cli, config, optim, quant
from beyond_outliers.bench import (
  loop,
  optimizers,
  peers,
  propagation,
  ptq,
  recipes,
  scaling,
  scoring,
  step,
  update_cost,
)
from beyond_outliers.bench.accelerator import driver as accelerator
from beyond_outliers.bench.accelerator.parts import CHECK_PARTS, CHECK_SCALES
from beyond_outliers.config.checks import require
from beyond_outliers.config.files import standard_json
from beyond_outliers.mesh import jax_settings


class Bench(NamedTuple):
  """One bench, selected by the flag of its name."""

  measure: Callable[..., Any]  # values of the flags in `takes` -> figures that JSON can hold
  takes: tuple[str, ...]
  table: Callable[[Any], str]  # the figures as text, for people
  help: str = ""  # of its flag, which takes a size if `measure` does, else is a switch
  rows: Collection[str] = ()  # from which --only selects
  default: Collection[str] = ()  # rows without --only; empty: all
  simulates: int = 0  # number of simulated devices; JAX must not have been asked for devices before
  failed: Callable[[Any], bool] | None = None  # whether figures show a failure: exit code 1


BENCHES: dict[str, Bench] = {
  "config": Bench(step.measure_step, ("config", "repeats"), step.step_table),
  "optimizers": Bench(
    optimizers.measure_optimizers,
    ("only", "tree", "repeats"),
    optimizers.optimizers_table,
    "Time optimizers' steps, and the peers', instead of a run's.",
    rows=optimizers.TIMED_OPTIMIZERS,
  ),
  "on_paper": Bench(
    update_cost.on_paper,
    ("only", "on_paper"),
    update_cost.on_paper_table,
    "Count what optimizers cost a device at this size.",
    rows=optim.OPTIMIZERS,
    simulates=max(update_cost.DEVICES),
  ),
  "collectives": Bench(
    update_cost.collectives,
    ("only", "collectives"),
    update_cost.collectives_table,
    "Compile optimizers' updates of this size for meshes.",
    rows=optim.OPTIMIZERS,
    simulates=max(update_cost.DEVICES),
  ),
  "scaling": Bench(
    scaling.measure_scaling,
    ("only", "scaling", "compile_for"),
    scaling.scaling_table,
    "Predict a step of this size on many devices from its compiled program.",
    rows=scaling.ROWS,
    simulates=max(scaling.DEVICE_MESHES),
  ),
  "recipes": Bench(
    recipes.measure_recipes,
    ("only", "repeats"),
    recipes.recipes_table,
    "Time quantization recipes beside full precision, instead of a run's step.",
    rows=recipes.LAYER_RECIPES,
    default=recipes.DEFAULT,
  ),
  "ptq": Bench(
    ptq.measure_ptq,
    ("ptq", "only"),
    ptq.ptq_table,
    "Time quantizing a model of this size after its training.",
    rows=quant.METHODS,
  ),
  "propagation": Bench(
    propagation.measure_propagation,
    ("propagation",),
    propagation.propagation_table,
    "Time decomposing the error of a quantized model of this size.",
  ),
  "scoring": Bench(
    scoring.measure_scoring,
    ("scoring", "repeats"),
    scoring.scoring_table,
    "Time zero-shot scoring with a model of this size.",
  ),
  "loop": Bench(
    loop.measure_loop,
    ("loop", "repeats"),
    loop.loop_table,
    "Time what a run does between its steps, and saving a state of this size.",
  ),
  "accelerator": Bench(
    accelerator.measure_accelerator,
    ("only", "out", "scale", "minutes"),
    accelerator.accelerator_table,
    "Check an accelerator: whether it is right, and how near to its peak.",
    rows=CHECK_PARTS,
    failed=accelerator.failures,
  ),
  "peers": Bench(
    peers.measure_peers,
    ("only", "repeats", "peer_python"),
    peers.peers_table,
    "Time our work by turns with that of other libraries.",
    rows=peers.ROWS,
  ),
}

for _name, _bench in BENCHES.items():
  if _name == "config":
    continue  # defined by cli, below
  elif _name in _bench.takes:
    flags.DEFINE_enum(_name, None, list(config.SIZES), _bench.help)
  else:
    flags.DEFINE_bool(_name, None, _bench.help)
cli.config_flag(*(name for name in BENCHES if name != "config"))
ONLY_ROWS = flags.DEFINE_list("only", [], "Rows that are timed or counted; all by default.")
TREE = flags.DEFINE_enum(
  "tree", "full", list(optimizers.TREES), "Parameters that --optimizers updates."
)
COMPILE_FOR = flags.DEFINE_enum(
  "compile_for", "cpu", ["cpu", *scaling.TOPOLOGIES], "Whose programs --scaling reads."
)
REPEATS = flags.DEFINE_integer("repeats", 8, "Timed repeats of everything.", lower_bound=1)
OUT = cli.path_flag("out", None, "Folder of --accelerator's figures, one file a part.")
SCALE = flags.DEFINE_enum(
  "scale",
  None,
  list(CHECK_SCALES),
  "Of --accelerator's models; full, and tiny on a CPU, by default.",
)
MINUTES = flags.DEFINE_float("minutes", 8, "For all parts of --accelerator together.")
PEER_PYTHON = flags.DEFINE_string(
  "peer_python",
  sys.executable,
  "Interpreter of what --peers compares with and imports nothing of ours.",
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  asked = next(name for name in BENCHES if flags.FLAGS[name].value)
  bench = BENCHES[asked]
  _check_flags(asked)
  jax_settings.check_usable()
  if bench.simulates:
    update_cost.simulate_devices(bench.simulates)
  figures = bench.measure(*(_argument(flag, bench) for flag in bench.takes))
  print(json.dumps(standard_json(figures)) if JSON.value else bench.table(figures))
  if bench.failed and bench.failed(figures):
    sys.exit(1)


def _check_flags(asked: str) -> None:
  """Refuses flags that would have no effect, and rows that the bench does not have.

  Errors: ConfigError."""
  for flag in (ONLY_ROWS, TREE, COMPILE_FOR, REPEATS, OUT, SCALE, MINUTES, PEER_PYTHON):
    takers = [name for name, bench in BENCHES.items() if flag.name in bench.takes]
    require(
      asked in takers or not flag.present,
      f"--{flag.name}",
      flag.value,
      f"changes nothing of --{asked}; leave it out, it is for "
      + ", ".join(f"--{name}" for name in takers),
    )
  rows = BENCHES[asked].rows
  for name in ONLY_ROWS.value:
    require(name in rows, "--only", name, "expected some of " + ", ".join(rows))


def _argument(flag: str, bench: Bench) -> Any:
  value = flags.FLAGS[flag].value
  if flag == "config":
    return config.resolve(value)
  if flag == "only":
    return value or list(bench.default or bench.rows)
  return value


if __name__ == "__main__":
  cli.take_huge_pages()
  cli.run_command(main)
