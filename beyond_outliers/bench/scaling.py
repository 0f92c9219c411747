"""A training step on many devices, on paper: what its compiled program sends along each axis of the
mesh, its memory, and the time that this would take at the peaks of known chips.

  python -m beyond_outliers.bench --scaling=50m [--only=shampoo/none/64,adamw/none/64] [--json]

configs/<optimizer>.py at that size, with its own batch, partitioned for simulated devices; nothing
runs. XLA's CPU compiler partitions as the others do, but leaves an all-reduce of which each device
takes a part, where those write a reduce-scatter of half the bytes; and it has no flash attention,
whose scores count among the temporaries. Bytes are around a ring, and of a step that renews all
that is ever renewed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from beyond_outliers import cli, hardware
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import hlo, update_cost
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json

# Devices -> along data, fsdp and model. Eight split the parameters, which a host of GPUs has.
MESHES = {8: (1, 8, 1), 64: (8, 8, 1), 256: (32, 8, 1)}
ROWS = [
  f"{optimizer}/{recipe}/{devices}"
  for optimizer in ("adamw", "muon", "shampoo", "soap")
  for recipe in ("none", "quest_w4a4")
  for devices in MESHES
]
# Of the peak, that a decomposition in float32 is taken to reach. An assumption: none is published.
DECOMPOSITIONS = 0.01


def measure_scaling(names: Iterable[str], size: str) -> list[Json]:
  """Figures of each row: bytes, FLOPs and seconds of one device."""
  rows = []
  for name in names:
    began = time.perf_counter()
    rows.append(_row(name, size))
    print(f"{size} {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
  return rows


def _row(name: str, size: str) -> Json:
  optimizer, recipe, devices = name.split("/")
  mesh = MESHES[int(devices)]
  axes = ",".join(
    f"mesh.{axis}={count}" for axis, count in zip(("data", "fsdp", "model"), mesh, strict=True)
  )
  c = study_config(optimizer, f"{size},{axes},quant.recipe={recipe}")
  program = program_lib.build_program(c, jax.devices()[: math.prod(mesh)])
  with mesh_lib.use(program.mesh):
    lowered = program.train_step.lower(program.state, program.batch)
  compiled = lowered.compile(update_cost.COMPILER_OPTIONS)
  memory = compiled.memory_analysis()
  update, _ = update_cost.flops_of_update(program)
  model = transformer.flops_per_token(c.model, c.context) * c.batch_size * c.context
  figures: Json = {
    "size": size,
    "optimizer": optimizer,
    "recipe": recipe,
    "mesh": mesh,
    "sent_bytes": hlo.sent_by_axes(hlo.instructions(str(compiled.as_text())), program.mesh.shape),
    "state_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "flops/model": model / program.mesh.size,
    "flops/update": update.total() - update["decompositions"],
    "flops/decompositions": update["decompositions"],
  }
  seconds = {
    chip: predicted_seconds(figures, peaks, program.mesh.shape)
    for chip, peaks in hardware.CHIPS.items()
  }
  return {**figures, "seconds": seconds}


def predicted_seconds(figures: Json, chip: hardware.Chip, shape: Mapping[str, int]) -> Json:
  """Seconds of a step's parts at a chip's peaks: the model, the optimizer's update, which also
  reads and writes the state, and what is sent. They overlap more or less: a step takes from the
  longest of computing and sending to their sum."""
  update = figures["flops/update"] + figures["flops/decompositions"] / DECOMPOSITIONS
  sending = 0.0
  for axes, count in figures["sent_bytes"].items():
    # The last axis is the innermost: those behind an axis lie between its neighbours.
    first = list(shape).index(axes.split("·")[0])
    spanned = math.prod(list(shape.values())[first:])
    sending += count / (chip.fast if spanned <= chip.together else chip.slow)
  parts = {
    "model": figures["flops/model"] / chip.flops,
    "update": update / chip.flops + 2 * figures["state_bytes"] / chip.memory_bandwidth,
    "sending": sending,
  }
  computing = parts["model"] + parts["update"]
  return {**parts, "least": max(computing, sending), "most": computing + sending}


HEAD = ("size", "optimizer", "recipe", "data·fsdp·model", "MiB sent along axes", "MiB: state, rest")


def scaling_table(rows: Iterable[Mapping[str, Any]]) -> str:
  """One line per row; of each chip, the least and the most that a step takes, and the share of the
  update in its computing."""
  head = (*HEAD, *(f"{chip}: ms, update" for chip in hardware.CHIPS))
  return "\n".join(cli.aligned([head, *map(_cells, rows)]))


def _cells(row: Mapping[str, Any]) -> list[str]:
  sent = [f"{axes} {count / 2**20:,.0f}" for axes, count in sorted(row["sent_bytes"].items())]
  times = [
    f"{of['least'] * 1e3:,.1f}–{of['most'] * 1e3:,.1f}, "
    f"{of['update'] / (of['update'] + of['model']):.0%}"
    for of in row["seconds"].values()
  ]
  return [
    *(row["size"], row["optimizer"], row["recipe"], "·".join(map(str, row["mesh"]))),
    *(", ".join(sent), f"{row['state_bytes'] / 2**20:,.0f}, {row['temporary_bytes'] / 2**20:,.0f}"),
    *times,
  ]
