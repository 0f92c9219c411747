"""Costs of a run between its steps: the loop and its hooks, and saving.

  python -m beyond_outliers.bench --loop=nano [--repeats=8] [--json]

The loop is timed around a step that computes nothing. Saving is timed for as long as it blocks
training, on this size's AdamW state, alternately with digests and sums and without.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from beyond_outliers import config, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.train import hooks, loop
from beyond_outliers.train import program as program_lib
from beyond_outliers.train.step import TrainState
from beyond_outliers.types import Batch, Json, Metrics
from beyond_outliers.workdir import Workdir

STEPS = 1000
PAUSE = 0.5  # seconds between two checkpoints, for writing and summing them


def measure_loop(size: str, repeats: int) -> Json:
  """Host seconds of a step, and of a row of the log; and seconds for which a checkpoint blocks
  training, with digests and sums (`save_seconds`) and without (`save_seconds/bare`)."""
  c = study_config("adamw", size)
  program = program_lib.build_program(c)
  with mesh_lib.use(program.mesh), tempfile.TemporaryDirectory() as folder:
    quiet, rows = (
      _host_seconds(pathlib.Path(folder, str(every)), every, repeats)
      for every in (2 * STEPS, c.log.every)
    )
    saving = _save_seconds(program.init(), pathlib.Path(folder, "saving"), repeats)
  return {
    "size": c.size,
    "device": jax.devices()[0].device_kind,
    "host_seconds": quiet,
    "host_seconds/row": (rows - quiet) * c.log.every,
    "log_every": c.log.every,
    **saving,
  }


def _host_seconds(folder: pathlib.Path, every: int, repeats: int) -> float:
  """Seconds per step that the main thread works, in the loop with the hooks of every run and a row
  of the log every `every` steps."""
  from beyond_outliers import checkpoint  # imports Orbax, which takes a second, for this bench only

  workdir = Workdir(folder)
  workdir.set_status("running", 0)
  sinks = [writers.JsonLines(workdir, 0), writers.Heartbeat(workdir, 0)]
  zero, clock = jnp.zeros((), jnp.int32), loop.Clock()
  state = TrainState(zero, {"w": jnp.zeros(8)}, (), zero, zero)
  metrics = {"train/loss": jnp.zeros(()), "skipped": zero, "skipped_in_a_row": zero}
  options = config.Checkpoint(2 * STEPS, 1, 0, True)
  keep = checkpoint.Checkpoints(workdir.checkpoints, options)
  log = hooks.LogMetrics(
    every,
    sinks,
    clock,
    state,
    tokens_per_step=1,
    flops_per_step=1.0,
    peak_flops=1.0,
    num_steps=2 * STEPS,
    max_skipped=1,
  )
  last = dict(num_steps=2 * STEPS, before=log.flush)
  evaluate = hooks.Evaluate(2 * STEPS, lambda params: {}, sinks, clock, **last)
  save = hooks.Save(options, keep, dict, clock, tokens_per_step=1, **last)
  watchdog = hooks.Watchdog(3600, workdir, 0)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    return state, metrics

  batch: Any = {}
  around, times = [log, evaluate, save, watchdog], []
  try:
    for _ in range(repeats + 1):  # the first compiles
      begin = time.thread_time()
      loop.fit(step, state, iter([batch] * STEPS), around, STEPS)
      times.append((time.thread_time() - begin) / STEPS)
    return statistics.median(times[1:])
  finally:
    watchdog.close()
    save.close()
    keep.close()


def _save_seconds(state: TrainState, folder: pathlib.Path, repeats: int) -> Json:
  """Median seconds for which `save` and the wait before it block a run, of checkpoints alternately
  with digests and sums and without; and the bytes of the state."""
  from beyond_outliers import checkpoint

  keepers = {
    name: checkpoint.Checkpoints(folder / name, config.Checkpoint(1, 1, 0, verify))
    for name, verify in (("whole", True), ("bare", False))
  }
  times: dict[str, list[float]] = {name: [] for name in keepers}
  for number in range(1, repeats + 2):
    for name, keep in keepers.items():
      keep.wait()
      begin = time.perf_counter()
      keep.save(number, state, {}, {"seconds": 0.0})
      times[name].append(time.perf_counter() - begin)
      time.sleep(PAUSE)
  for keep in keepers.values():
    keep.close()
  whole, bare = times["whole"][1:], times["bare"][1:]  # the first compiles
  return {
    "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    "save_seconds": statistics.median(whole),
    "save_seconds/bare": statistics.median(bare),
    "save_ratio": statistics.median(a / b for a, b in zip(whole, bare, strict=True)),
  }


def loop_table(figures: Mapping[str, Any]) -> str:
  """Two lines: the loop, and saving."""
  f = figures
  return (
    f"loop and hooks: {1e6 * f['host_seconds']:.0f} µs of the host a step, "
    f"{1e6 * f['host_seconds/row']:.0f} µs more with a row of the log (every {f['log_every']} "
    f"steps)\nsaving {f['size']} ({f['state_bytes'] / 2**20:,.0f} MiB) on {f['device']}: training "
    f"waits {1e3 * f['save_seconds']:.0f} ms, without digests and sums "
    f"{1e3 * f['save_seconds/bare']:.0f} ms, {f['save_ratio']:.2f} times as long"
  )
