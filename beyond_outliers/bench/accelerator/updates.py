"""Optimizers' updates alone, at the study's settings and others, as a share of the model's step.

One period late in a run is timed step by step: ordinary steps, and those that renew roots, bases or
factors. Their mean is compared with the model's own time for the study's tokens per step.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from beyond_outliers import hardware
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.accelerator import utilization
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.bench.late_steps import late
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json, Params

UPDATED = {"full": "760m", "tiny": utilization.TINY}
TOKENS = 524_288  # per step of the study
AIM = 0.1  # Shampoo's step over AdamW's
MILD = "optimizer.block_size=1024"

# row -> (optimizer, its settings), those with an aim first and the longest last.
TIMED_UPDATES = {
  "adamw": ("adamw", ""),
  "shampoo, newton, blocks of 1024": ("shampoo", f"{MILD},optimizer.root=newton"),
  "muon": ("muon", ""),
  "scion": ("scion", ""),
  "shampoo, eigh, blocks of 1024": ("shampoo", MILD),
  "psgd": ("psgd", ""),
  "soap": ("soap", ""),
  "shampoo": ("shampoo", ""),
}
TINY_UPDATES = ("adamw",)


def part_rows(scale: str, found: Found) -> Rows:
  del found
  for name, (optimizer, settings) in TIMED_UPDATES.items():
    if scale == "full" or name in TINY_UPDATES:
      argument = ",".join(filter(None, (UPDATED[scale], settings)))
      yield name, functools.partial(measure_update, optimizer, argument)


def measure_update(optimizer: str, argument: str) -> Json:
  """Seconds of the steps of one period: median, longest and mean."""
  c = study_config(optimizer, argument)
  program = program_lib.build_program(c, jax.devices()[:1])
  tx = program.optimizer.tx
  with mesh_lib.use(program.mesh):
    params = transformer.init(program.model, c.seed)
    gradients = jax.jit(_random_like)(params)

    def renewed(gradients, state, params):
      updates, state = tx.update(gradients, state, params)
      return state, updates  # state first: a donated buffer goes to the first result of its shape

    update = jax.jit(renewed, donate_argnums=1)
    state = jax.tree.map(lambda x: jnp.asarray(late(x, x)), jax.jit(tx.init)(params))

    def step() -> Any:
      nonlocal state
      state, updates = update(gradients, state, params)
      return updates, state

    hardware.seconds_of(step, 1)  # compiles
    times = hardware.seconds_of(step, c.optimizer.period)
  return {
    "argument": argument,
    "period": c.optimizer.period,
    "ordinary_seconds": statistics.median(times),
    "longest_seconds": max(times),
    "amortised_seconds": statistics.mean(times),
    "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    "model_flops": TOKENS * transformer.flops_per_token(c.model, c.context),
  }


def _random_like(params: Params) -> Params:
  """Random arrays of these shapes, of full rank as gradients are."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  draws = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, draws)


def cells(found: Found, others: Mapping[str, Found]) -> Cells:
  """Lines of the table: each update as a share of the model's step at its best measured speed."""
  best = utilization.best_of(others.get("utilization", {}), UPDATED["full"])
  shown = []
  for name, row in found.items():
    seconds = row["amortised_seconds"]
    figure = (
      f"{1e3 * seconds:,.1f} ms: {1e3 * row['ordinary_seconds']:,.1f}, longest "
      f"{1e3 * row['longest_seconds']:,.1f}"
    )
    aim = ""
    if best:
      model = row["model_flops"] / best["flops_per_second"]
      figure += f"; {seconds / model:.1%} of the model's"
      if adamw := found.get("adamw"):
        over = (model + seconds) / (model + adamw["amortised_seconds"]) - 1
        figure += f"; {over:+.1%} over AdamW"
        if name.startswith("shampoo"):
          aim = f"≤ +{AIM:.0%}, {'met' if over <= AIM else 'missed'}"
    shown.append((name, figure, aim))
  return shown
