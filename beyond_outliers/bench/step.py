"""Costs of a run's step on this machine: seconds of its parts, its input and the loop around it;
memory; and the share of the peak.

  python -m beyond_outliers.bench --config=configs/adamw.py:50m [--repeats=8] [--json]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from beyond_outliers import cli, config, data, hardware
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.model import transformer
from beyond_outliers.train import hooks, loop
from beyond_outliers.train import program as program_lib
from beyond_outliers.train import step as step_lib
from beyond_outliers.types import Batch, Json, Metrics, Params

# A compiled train step, to which the state is donated.
TrainStep = Callable[[step_lib.TrainState, Batch], tuple[step_lib.TrainState, Metrics]]


def measure_step(c: config.Config, repeats: int) -> Json:
  """All figures of the table, flat: seconds, bytes, FLOP/s."""
  program = program_lib.build_program(c)
  dataset = data.prepare(c.data, log=lambda text: print(text, file=sys.stderr))
  figures: Json = {
    "config": c.size,
    "dtype": c.model.dtype,
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
  }
  for dtype in ("float32", "bfloat16"):
    figures[f"peak_flops/{dtype}"] = hardware.measure_matmul(dtype)

  with mesh_lib.use(program.mesh):
    start = time.perf_counter()
    compiled = program.compile_train_step()
    figures["compile_seconds"] = time.perf_counter() - start
    figures["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes

    batches = data.train_batches(
      dataset, c.data, context=c.context, batch_size=c.batch_size, seed=c.seed
    )

    def read() -> Batch:
      return mesh_lib.put_batch(next(batches), program.mesh, c.batch_size)

    parts, state = seconds_of_parts(program, compiled, program.init(), read(), repeats)
    figures |= parts
    figures["input_seconds"] = hardware.median_seconds(read, repeats)
    figures["loop_overhead"] = loop_overhead(
      program, compiled, state, batches, steps=max(3 * repeats, 20)
    )
    figures["reading_tokens_per_cpu_second"] = reading(batches, c.batch_size * c.context)
    batches.close()

  peak, figures["peak_source"] = hardware.peak_flops(c.model.dtype)
  figures["tokens_per_second"] = c.batch_size * c.context / figures["step_seconds"]
  figures["flops_per_second"] = figures["tokens_per_second"] * transformer.flops_per_token(
    c.model, c.context
  )
  figures["peak_share"] = figures["flops_per_second"] / (peak * jax.device_count())
  figures["peak_memory_bytes"] = hardware.memory_bytes()
  return figures


def seconds_of_parts(
  program: program_lib.Program,
  train_step: TrainStep,
  state: step_lib.TrainState,
  batch: Batch,
  repeats: int,
) -> tuple[Json, step_lib.TrainState]:
  """(seconds of the forward pass and of whole steps, and by subtraction of the backward pass and
  the optimizer; the state after these steps, which replaces the one passed in)."""
  c = program.config
  loss_fn = step_lib.make_loss_fn(program.forward)
  key = jax.random.key(0)

  @jax.jit
  def forward(params: Params, batch: Batch) -> jax.Array:
    return loss_fn(params, batch, key)[0]

  @jax.jit
  def forward_backward(params: Params, batch: Batch) -> Any:
    return step_lib.accumulate(loss_fn, c.micro_batches)(params, batch, key)

  def step() -> Metrics:
    nonlocal state
    state, metrics = train_step(state, batch)
    return metrics

  figures: Json = {
    "forward_seconds": hardware.median_seconds(lambda: forward(state.params, batch), repeats)
  }
  both = hardware.median_seconds(lambda: forward_backward(state.params, batch), repeats)
  figures |= whole_periods(step, c.optimizer.period, repeats)
  figures["backward_seconds"] = both - figures["forward_seconds"]
  figures["optimizer_seconds"] = figures["step_seconds"] - both
  figures["optimizer_amortised_seconds"] = figures["mean_step_seconds"] - both
  return figures, state


def whole_periods(step: Callable[[], Any], period: int, repeats: int) -> Json:
  """Median, mean and longest seconds of a step, over whole periods of the optimizer.

  Times at least `repeats` steps, after a first period that is not counted."""
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
  train_step: TrainStep,
  state: step_lib.TrainState,
  batches: Iterator[Any],
  steps: int,
) -> float:
  """1 − Σ step time / wall time of a run's loop with its log, without the first step. Each step is
  waited for."""
  c, spent, began = program.config, [], []

  def timed(state, batch):
    began.append(time.perf_counter())
    state, metrics = train_step(state, batch)
    jax.block_until_ready(metrics)
    spent.append(time.perf_counter() - began[-1])
    return state, metrics

  end = int(state.step) + steps
  log = hooks.LogMetrics(
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
  placed = (mesh_lib.put_batch(batch, program.mesh, c.batch_size) for batch in batches)
  loop.fit(timed, state, placed, [log], end)
  return 1 - sum(spent[1:]) / (time.perf_counter() - began[1])


def reading(batches: Iterator[Any], tokens: int, seconds: float = 2.0) -> float:
  """Tokens that the data pipeline reads per second of CPU time, over all threads of this process.
  tokens: per batch."""
  count, start = 0, time.process_time()
  while time.process_time() - start < seconds:
    next(batches)
    count += 1
  return count * tokens / (time.process_time() - start)


def step_table(figures: Mapping[str, Any]) -> str:
  """One line per figure; parts of the step as shares of it."""
  r, step = figures, figures["step_seconds"]
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
    amortised = f"{r['optimizer_amortised_seconds'] * 1e3:,.1f} ms"
    rows += [
      (f"  optimizer, mean of {r['period']} steps", amortised),
      ("longest step", f"{r['longest_step_seconds'] * 1e3:,.1f} ms"),
    ]
  read = r["reading_tokens_per_cpu_second"] / 1e6
  share = f"{r['peak_share']:.1%} of peak ({r['peak_source']})"
  rows += [
    ("input (read ahead while a step runs)", f"{r['input_seconds'] * 1e3:,.1f} ms"),
    ("reading alone", f"{read:,.1f} million tokens per CPU-second"),
    ("loop overhead, 1 − Σ steps / wall", f"{r['loop_overhead']:.1%}"),
    ("throughput", f"{r['tokens_per_second']:,.0f} tokens/s"),
    ("model FLOP/s", f"{r['flops_per_second'] / 1e9:,.0f} GFLOP/s, {share}"),
    ("temporaries of a step", f"{r['temporary_bytes'] / 2**20:,.0f} MiB"),
    ("peak memory", f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB"),
  ]
  return "\n".join(cli.aligned(rows))
