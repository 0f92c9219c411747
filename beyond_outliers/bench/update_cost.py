"""Costs of an optimizer's update without running it: FLOPs counted in its traced program, and
traffic read from the program compiled for a mesh.

  python -m beyond_outliers.bench --on_paper=760m [--only=adamw,shampoo] [--json]
  python -m beyond_outliers.bench --collectives=50m [--only=shampoo] [--json]

Both use configs/<optimizer>.py at that size, with gradients sharded like the parameters. They only
need shapes: devices are simulated. The training step around the update is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from beyond_outliers import cli, config
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import hlo, jaxpr_flops
from beyond_outliers.bench.late_steps import late_steps
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.train import describe
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json

Mesh = tuple[int, int, int]  # devices along data, fsdp and model

DEVICES = (1, 8, 64)  # for on_paper: parameters and state are split over all of them (fsdp)
MESHES = ((1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1))  # for collectives

# Only the program's text is needed, so it is not optimized.
COMPILER_OPTIONS: dict[str, Any] = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  # These would start a compiler for every fusion, most of the time for big programs.
  "xla_cpu_use_fusion_emitters": False,
}


def simulate_devices(count: int) -> None:
  """Simulates that many devices; to be called before JAX is asked for devices."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


def programs(
  name: str, size: str, meshes: Iterable[Mesh]
) -> Iterator[tuple[Mesh, program_lib.Program]]:
  """configs/<name>.py at `size` on each mesh that divides the model and its batch."""
  for mesh in meshes:
    axes = ",".join(
      f"mesh.{axis}={count}" for axis, count in zip(("data", "fsdp", "model"), mesh, strict=True)
    )
    c = study_config(name, f"{size},{axes}")
    try:
      yield mesh, program_lib.build_program(c, jax.devices()[: math.prod(mesh)])
    except config.ConfigError:
      continue


def compiled_update(program: program_lib.Program) -> list[hlo.Instruction]:
  """Instructions that each device runs for the optimizer's update alone."""
  params, state = program.state.params, program.state.opt_state
  placed = jax.tree.map(lambda x: x.sharding, (params, state))
  update = jax.jit(program.optimizer.tx.update, donate_argnums=1, out_shardings=placed)
  with mesh_lib.use(program.mesh):
    return hlo.instructions(
      str(update.lower(params, state, params).compile(COMPILER_OPTIONS).as_text())
    )


def collectives(names: Iterable[str], size: str) -> list[Json]:
  """Traffic and decompositions of an update: one row per optimizer and mesh.

  Bytes that collectives move to a device, and matrices that it passes to LAPACK, out of all.

  Both count as if everything that is ever renewed were renewed in one step, in every way that the
  program has, such as SOAP's at its first step."""
  rows = []
  for name in names:
    every: dict[str, int] = {}
    for mesh, program in programs(name, size, MESHES):
      update = compiled_update(program)
      mine, params = hlo.decompositions(update), jax.tree.leaves(program.state.params)
      every = every or mine  # the first mesh has one device, which has all matrices
      rows.append(
        {
          "optimizer": name,
          "mesh": mesh,
          "bytes": hlo.received(update),
          "parameter_bytes": sum(x.size * x.dtype.itemsize for x in params),
          "in_loops": sum(bool(one.loops) for one in update if hlo.collective(one)),
          "kinds": _by_kind(update),
          "matrices": {
            kernel: {"device": mine.get(kernel, 0), "every": count}
            for kernel, count in every.items()
          },
        }
      )
  return rows


def _by_kind(update: Iterable[hlo.Instruction]) -> Json:
  """{kind of collective: {"number": ..., "bytes": ...}}, in the order of hlo.COLLECTIVES."""
  found: dict[str, list[hlo.Instruction]] = {kind: [] for kind in hlo.COLLECTIVES}
  for one in update:
    if kind := hlo.collective(one):
      found[kind].append(one)
  return {
    kind: {"number": len(those), "bytes": hlo.received(those)}
    for kind, those in found.items()
    if those
  }


def on_paper(names: Iterable[str], size: str) -> list[Json]:
  """Cost of an update on paper: one row per optimizer and number of devices.

  FLOPs, bytes of state and bytes moved are those of one device and one step."""
  meshes = [(1, devices, 1) for devices in DEVICES]
  adamw = {
    mesh: flops_of_update(program)[0].total() for mesh, program in programs("adamw", size, meshes)
  }
  rows = []
  for name in names:
    for mesh, program in programs(name, size, meshes):
      c = program.config
      tokens = c.batch_size * c.context
      model = tokens * transformer.flops_per_token(c.model, c.context) / program.mesh.size
      mean, costliest = flops_of_update(program)
      rows.append(
        {
          "optimizer": name,
          "devices": program.mesh.size,
          "flops": mean.total(),
          **{f"flops/{kind}": mean[kind] for kind in jaxpr_flops.KINDS},
          "flops/costliest": costliest.total(),
          "flops/model": model,
          "over_adamw": (model + mean.total()) / (model + adamw[mesh]),
          "state_bytes": describe.shard_bytes(program.state.opt_state),
          "moved_bytes": hlo.received(compiled_update(program)),
        }
      )
  return rows


def flops_of_update(program: program_lib.Program) -> tuple[jaxpr_flops.Flops, jaxpr_flops.Flops]:
  """(mean FLOPs over the steps of a period, FLOPs of its costliest step), on one device, late in a
  run."""
  params, state = program.state.params, program.state.opt_state
  with mesh_lib.use(program.mesh):
    update = jax.make_jaxpr(program.optimizer.tx.update)(params, state, params)
  each = [
    step.flops
    for step in late_steps(update, state, program.config.optimizer.period, program.mesh.size)
  ]
  mean = jaxpr_flops.Flops(
    {kind: sum(of_step[kind] for of_step in each) / len(each) for kind in jaxpr_flops.KINDS}
  )
  return mean, max(each, key=jaxpr_flops.Flops.total)


COLLECTIVES_HEAD = (
  *("optimizer", "data·fsdp·model"),
  *("MiB moved", "of parameters", "in loops"),
  *("collectives, MiB", "matrices on a device, of all"),
)


def collectives_table(rows: Iterable[Mapping[str, Any]]) -> str:
  """One line per optimizer and mesh."""
  return "\n".join(cli.aligned([COLLECTIVES_HEAD, *map(_collectives_cells, rows)]))


def _collectives_cells(row: Mapping[str, Any]) -> list[str]:
  kinds = [f"{of['number']} {kind} {_mebi(of['bytes'], 1)}" for kind, of in row["kinds"].items()]
  matrices = [
    f"{kernel}: {count['device']} of {count['every']}" for kernel, count in row["matrices"].items()
  ]
  return [
    *(row["optimizer"], "·".join(map(str, row["mesh"]))),
    *(_mebi(row["bytes"], 1), f"{row['bytes'] / row['parameter_bytes']:.2f}"),
    str(row["in_loops"]),
    *(", ".join(kinds), ", ".join(matrices)),
  ]


ON_PAPER_HEAD = (
  *("optimizer", "devices"),
  *("TFLOP per step", *jaxpr_flops.KINDS, "costliest step"),
  *("of the model's", "with it, over AdamW"),
  *("MiB of state", "MiB moved"),
)


def on_paper_table(rows: Iterable[Mapping[str, Any]]) -> str:
  """One line per optimizer and number of devices."""
  return "\n".join(cli.aligned([ON_PAPER_HEAD, *map(_on_paper_cells, rows)]))


def _on_paper_cells(row: Mapping[str, Any]) -> list[str]:
  counted = ("flops", *(f"flops/{kind}" for kind in jaxpr_flops.KINDS), "flops/costliest")
  return [
    *(row["optimizer"], str(row["devices"])),
    *(f"{row[key] / 1e12:,.3f}" for key in counted),
    *(f"{row['flops'] / row['flops/model']:.2%}", f"{row['over_adamw']:.3f}"),
    *(_mebi(row["state_bytes"], 0), _mebi(row["moved_bytes"], 0)),
  ]


def _mebi(count: float, digits: int) -> str:
  return f"{count / 2**20:,.{digits}f}"
