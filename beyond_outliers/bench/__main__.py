"""What a step costs on this machine, and where its time and memory go.

  python -m beyond_outliers.bench --config=configs/adamw.py:nano [--json]

and what optimizers' updates cost alone: timed beside their peers (bench/optimizers.py), or counted
without being run (bench/update_cost.py):

  python -m beyond_outliers.bench --optimizers                 milliseconds on one core
  python -m beyond_outliers.bench --on_paper=760m              FLOPs, state and traffic of a device
  python -m beyond_outliers.bench --collectives=50m            what moves between devices in the compiled programs

and what quantization costs: beside full precision (bench/recipes.py), and after training, method by
method (bench/ptq.py):

  python -m beyond_outliers.bench --recipes                    a linear layer, and whole models
  python -m beyond_outliers.bench --ptq=50m                    seconds and memory

and how fast zero-shot questions are answered (bench/scoring.py):

  python -m beyond_outliers.bench --scoring=nano

Every time is a median over repeats in this one run: compare figures of one run with each other, not
with another day's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from beyond_outliers import cli, config, data, hardware, optim, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import optimizers, ptq, recipes, scoring, update_cost
from beyond_outliers.config import checks
from beyond_outliers.model import transformer
from beyond_outliers.train import hooks, loop
from beyond_outliers.train import program as program_lib
from beyond_outliers.train import step as step_lib

OPTIMIZERS = flags.DEFINE_bool(
  "optimizers", None, "Time optimizers' steps, and the peers', instead of a run's."
)
ON_PAPER = flags.DEFINE_enum(
  "on_paper", None, list(config.SIZES), "Count what optimizers cost a device at this size."
)
COLLECTIVES = flags.DEFINE_enum(
  "collectives", None, list(config.SIZES), "Compile optimizers' updates of this size for meshes."
)
RECIPES = flags.DEFINE_bool(
  "recipes", None, "Time quantization recipes beside full precision, instead of a run's step."
)
PTQ = flags.DEFINE_enum(
  "ptq", None, list(config.SIZES), "Time quantizing a model of this size after its training."
)
SCORING = flags.DEFINE_enum(
  "scoring", None, list(config.SIZES), "Time zero-shot scoring with a model of this size."
)
INSTEAD = ("optimizers", "on_paper", "collectives", "recipes", "ptq", "scoring")
CONFIG = cli.config_flag(*INSTEAD)
TREE = flags.DEFINE_enum(
  "tree", "full", list(optimizers.TREES), "Parameters that --optimizers updates."
)
ONLY = flags.DEFINE_list("only", [], "Rows that are timed or counted; all by default.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
REPEATS = flags.DEFINE_integer("repeats", 8, "Timed repeats of everything.", lower_bound=1)

# Flag -> what it is for, one of which must be asked for.
BELONGS_TO = {
  "only": ("optimizers", "on_paper", "collectives", "recipes", "ptq"),
  "tree": ("optimizers",),
  "repeats": ("config", "optimizers", "recipes", "scoring"),
}


def measure(c: config.Config, repeats: int) -> dict[str, Any]:
  """All figures as one flat dictionary; seconds, bytes, FLOP/s."""
  program = program_lib.build(c)
  dataset = data.prepare(c.data, log=lambda text: print(text, file=sys.stderr))
  result: dict[str, Any] = {
    "config": c.size,
    "dtype": c.model.dtype,
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
  }
  for dtype in ("float32", "bfloat16"):
    result[f"peak_flops/{dtype}"] = hardware.measure_matmul(dtype)

  with mesh_lib.use(program.mesh):
    start = time.perf_counter()
    compiled = program.train_step.lower(program.state, program.batch).compile()
    result["compile_seconds"] = time.perf_counter() - start
    result["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes

    batches = data.train_batches(
      dataset, c.data, context=c.context, batch_size=c.batch_size, seed=c.seed
    )
    batch = mesh_lib.put_batch(next(batches), program.mesh, c.batch_size)
    loss_fn = step_lib.make_loss_fn(program.forward)
    key = jax.random.key(0)
    forward = jax.jit(lambda params, batch: loss_fn(params, batch, key)[0])
    both = jax.jit(
      lambda params, batch: step_lib.accumulate(loss_fn, c.micro_batches)(params, batch, key)
    )
    holder = [program.init()]

    def step():
      holder[0], metrics = compiled(holder[0], batch)
      return metrics

    result["forward_seconds"] = hardware.median_seconds(
      lambda: forward(holder[0].params, batch), repeats
    )
    forward_backward = hardware.median_seconds(lambda: both(holder[0].params, batch), repeats)
    result |= whole_periods(step, c.optimizer.period, repeats)
    result["backward_seconds"] = forward_backward - result["forward_seconds"]
    result["optimizer_seconds"] = result["step_seconds"] - forward_backward
    result["optimizer_amortised_seconds"] = result["mean_step_seconds"] - forward_backward
    read = lambda: mesh_lib.put_batch(next(batches), program.mesh, c.batch_size)
    result["input_seconds"] = hardware.median_seconds(read, repeats)
    result["loop_overhead"] = loop_overhead(
      program, compiled, holder.pop(), batches, steps=max(3 * repeats, 20)
    )
    result["reading_tokens_per_cpu_second"] = reading(batches, c.batch_size * c.context)
    batches.close()

  tokens = c.batch_size * c.context
  peak, result["peak_source"] = hardware.peak_flops(c.model.dtype)
  result["tokens_per_second"] = tokens / result["step_seconds"]
  result["flops_per_second"] = result["tokens_per_second"] * transformer.flops_per_token(
    c.model, c.context
  )
  result["peak_share"] = result["flops_per_second"] / (peak * jax.device_count())
  result["peak_memory_bytes"] = hardware.memory_bytes()
  return result


def whole_periods(step: Callable[[], Any], period: int, repeats: int) -> dict[str, Any]:
  """Of at least `repeats` steps, in whole periods of the optimizer after its first: median, mean
  and longest time."""
  hardware.seconds_of(step, period)
  times = hardware.seconds_of(step, -(-repeats // period) * period)
  return {
    "period": period,
    "step_seconds": statistics.median(times),
    "mean_step_seconds": statistics.mean(times),
    "longest_step_seconds": max(times),
  }


def loop_overhead(
  program: program_lib.Program,
  train_step: Any,
  state: step_lib.TrainState,
  batches: Any,
  steps: int,
) -> float:
  """1 − Σ step time / wall time of a run's loop with its log, the first step left out; every step
  is waited for."""
  c, spent, began = program.config, [], []

  def timed(state, batch):
    began.append(time.perf_counter())
    state, metrics = train_step(state, batch)
    jax.block_until_ready(metrics)
    spent.append(time.perf_counter() - began[-1])
    return state, metrics

  end = int(state.step) + steps
  log = hooks.Log(
    c.log.every,
    [],
    loop.Clock(),
    state,
    tokens_per_step=1,
    flops_per_step=1.0,
    peak_flops=1.0,
    num_steps=end,
    max_skipped=c.max_skipped_updates,
  )
  loop.fit(
    timed,
    state,
    (mesh_lib.put_batch(batch, program.mesh, c.batch_size) for batch in batches),
    [log],
    end,
  )
  return 1 - sum(spent[1:]) / (time.perf_counter() - began[1])


def reading(batches: Any, tokens: int, seconds: float = 2.0) -> float:
  """Tokens that the data pipeline hands out a second of CPU time, all threads of this process
  together."""
  count, start = 0, time.process_time()
  while time.process_time() - start < seconds:
    next(batches)
    count += 1
  return count * tokens / (time.process_time() - start)


def table(result: dict[str, Any]) -> str:
  """The figures for a person."""
  r, step = result, result["step_seconds"]
  rows = [("device", f"{r['devices']} × {r['device']}")]
  rows += [
    (f"matmul peak, {dtype}", f"{r[f'peak_flops/{dtype}'] / 1e9:,.0f} GFLOP/s")
    for dtype in ("float32", "bfloat16")
  ]
  rows += [
    ("compile", f"{r['compile_seconds']:.1f} s"),
    (f"step, {r['dtype']}", f"{step * 1e3:,.1f} ms"),
  ]
  rows += [
    (f"  {part}", f"{r[f'{part}_seconds'] * 1e3:,.1f} ms  {r[f'{part}_seconds'] / step:>6.1%}")
    for part in ("forward", "backward", "optimizer")
  ]
  if r["period"] > 1:
    rows += [
      (
        f"  optimizer, mean of {r['period']} steps",
        f"{r['optimizer_amortised_seconds'] * 1e3:,.1f} ms",
      ),
      ("longest step", f"{r['longest_step_seconds'] * 1e3:,.1f} ms"),
    ]
  rows += [
    ("input (read ahead while a step runs)", f"{r['input_seconds'] * 1e3:,.1f} ms"),
    (
      "reading alone",
      f"{r['reading_tokens_per_cpu_second'] / 1e6:,.1f} million tokens a CPU-second",
    ),
    ("loop overhead, 1 − Σ steps / wall", f"{r['loop_overhead']:.1%}"),
    ("throughput", f"{r['tokens_per_second']:,.0f} tokens/s"),
    (
      "model FLOP/s",
      f"{r['flops_per_second'] / 1e9:,.0f} GFLOP/s, {r['peak_share']:.1%} of peak "
      f"({r['peak_source']})",
    ),
    ("temporaries of a step", f"{r['temporary_bytes'] / 2**20:,.0f} MiB"),
    ("peak memory", f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB"),
  ]
  return "\n".join(cli.aligned(rows))


def check_flags() -> None:
  """Errors: ConfigError for a flag that would change nothing."""
  asked = next(name for name in ("config", *INSTEAD) if flags.FLAGS[name].value)
  for name, belongs_to in BELONGS_TO.items():
    checks.require(
      asked in belongs_to or not flags.FLAGS[name].present,
      f"--{name}",
      flags.FLAGS[name].value,
      f"changes nothing of --{asked}; leave it out, it is for "
      + ", ".join(f"--{one}" for one in belongs_to),
    )


def rows() -> tuple[Any, str]:
  """(figures, as a table) of all that is not --config."""
  known = list(
    optimizers.ROWS
    if OPTIMIZERS.value
    else recipes.ROWS
    if RECIPES.value
    else quant.METHODS
    if PTQ.value
    else optim.OPTIMIZERS
  )
  for name in ONLY.value:
    checks.require(name in known, "--only", name, "expected some of " + ", ".join(known))
  if SCORING.value:
    result = scoring.run(SCORING.value, REPEATS.value)
    return result, scoring.table(result)
  if RECIPES.value:
    result = recipes.run(ONLY.value or recipes.DEFAULT, REPEATS.value)
    return result, recipes.table(result)
  names = ONLY.value or known
  if PTQ.value:
    result = ptq.run(PTQ.value, names)
    return result, ptq.table(result)
  if OPTIMIZERS.value:
    result = optimizers.run(names, TREE.value, REPEATS.value)
    return result, optimizers.table(result)
  update_cost.simulate_devices()
  if ON_PAPER.value:
    counted = update_cost.on_paper(names, ON_PAPER.value)
    return counted, update_cost.on_paper_table(counted)
  counted = update_cost.collectives(names, str(COLLECTIVES.value))
  return counted, update_cost.collectives_table(counted)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  check_flags()
  if CONFIG.value:
    result = measure(config.resolve(CONFIG.value), REPEATS.value)
    text = table(result)
  else:
    result, text = rows()
  print(json.dumps(result) if JSON.value else text)


if __name__ == "__main__":
  cli.run(main)
