"""A training step on many devices, on paper: the bytes that its compiled program sends along each
mesh axis, its memory, and the time that it would take at the peaks of known chips.

  python -m beyond_outliers.bench --scaling=50m [--only=shampoo/none/64] [--compile_for=v5e]

The program is that of configs/<optimizer>.py at that size and its own batch, of which a device
processes WINDOWS windows at once; nothing runs. --compile_for uses XLA's TPU compiler, which is in
the package libtpu, needs no TPU, and also tells if memory is too small. By default programs are
compiled for simulated CPUs: partitioned in the same way, but with an all-reduce where others have a
reduce-scatter of half the bytes, and with a CPU's temporaries. Bytes are those of ring collectives,
in a step that renews all of the optimizer's state that is ever renewed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from beyond_outliers import cli, config, hardware
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import hlo, update_cost
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.errors import ConfigError
from beyond_outliers.model import transformer
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json

# Devices -> mesh (data, fsdp, model). Parameters are split over eight, the GPUs of a host.
DEVICE_MESHES = {8: (1, 8, 1), 64: (8, 8, 1), 256: (32, 8, 1)}
ROWS = [
  f"{optimizer}/{recipe}/{devices}"
  for optimizer in ("adamw", "muon", "shampoo", "soap")
  for recipe in ("none", "quest_w4a4")
  for devices in DEVICE_MESHES
]
# The same devices as slices of TPUs.
TOPOLOGIES = {
  "v5e": {8: "2x4", 64: "8x8", 256: "16x16"},
  "v5p": {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"},
}
WINDOWS = 8
# Share of the peak that a float32 decomposition is assumed to reach; no published figure exists.
DECOMPOSITIONS = 0.01


def measure_scaling(names: Iterable[str], size: str, target: str) -> list[Json]:
  """Figures of each row: bytes, FLOPs and seconds of one device.

  target: "cpu", or a row of TOPOLOGIES. Errors: ConfigError if its compiler is not installed."""
  rows = []
  for name in names:
    began = time.perf_counter()
    rows.append(_row(name, size, target))
    print(f"{size} {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
  return rows


def _devices(count: int, target: str) -> Sequence[jax.Device]:
  if target == "cpu":
    return jax.devices()[:count]
  jax.config.update("jax_enable_compilation_cache", False)  # TPU programs only load on TPUs
  try:
    topology = f"{target}:{TOPOLOGIES[target][count]}"
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"--compile_for = {target!r}: needs the compiler for TPUs ({str(error).splitlines()[0]}); "
      "pip install -c constraints.txt 'jax[tpu]'"
    ) from None


def _row(name: str, size: str, target: str) -> Json:
  optimizer, recipe, count = name.split("/")
  mesh = DEVICE_MESHES[int(count)]
  axes = ",".join(
    f"mesh.{axis}={count}" for axis, count in zip(("data", "fsdp", "model"), mesh, strict=True)
  )
  parts = config.SIZES[size]["batch_size"] // (int(count) * WINDOWS)
  batch = f"micro_batches={max(parts, 1)},quant.recipe={recipe}"
  c = study_config(optimizer, f"{size},{axes},{batch}")
  program = program_lib.build_program(c, _devices(int(count), target))
  row: Json = dict(size=size, optimizer=optimizer, recipe=recipe, mesh=mesh, compiled_for=target)
  with mesh_lib.use(program.mesh):
    lowered = program.train_step.lower(program.state, program.batch)
  try:
    compiled = lowered.compile(update_cost.COMPILER_OPTIONS if target == "cpu" else None)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {**row, "does_not_fit": str(error).splitlines()[0]}
  memory = compiled.memory_analysis()
  update, _ = update_cost.flops_of_update(program)
  model = transformer.flops_per_token(c.model, c.context) * c.batch_size * c.context
  figures: Json = {
    **row,
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
  reads and writes the state, and sending. Computing and sending may overlap: a step takes at least
  the longer of the two, and at most their sum."""
  update = figures["flops/update"] + figures["flops/decompositions"] / DECOMPOSITIONS
  sending = 0.0
  for axes, count in figures["sent_bytes"].items():
    # The last axis is the innermost: a ring along an axis spans all later axes too.
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
  """One line per row; for each chip, the least and the most that a step takes, and the update's
  share of the computing."""
  head = (*HEAD, *(f"{chip}: ms, update" for chip in hardware.CHIPS))
  return "\n".join(cli.aligned([head, *map(_cells, rows)]))


def _cells(row: Mapping[str, Any]) -> list[str]:
  begin = [row["size"], row["optimizer"], row["recipe"], "·".join(map(str, row["mesh"]))]
  if "does_not_fit" in row:
    return [*begin, row["does_not_fit"], *[""] * (1 + len(hardware.CHIPS))]
  sent = [f"{axes} {count / 2**20:,.0f}" for axes, count in sorted(row["sent_bytes"].items())]
  times = [
    f"{of['least'] * 1e3:,.1f}–{of['most'] * 1e3:,.1f}, "
    f"{of['update'] / (of['update'] + of['model']):.0%}"
    for of in row["seconds"].values()
  ]
  return [
    *begin,
    *(", ".join(sent), f"{row['state_bytes'] / 2**20:,.0f}, {row['temporary_bytes'] / 2**20:,.0f}"),
    *times,
  ]
