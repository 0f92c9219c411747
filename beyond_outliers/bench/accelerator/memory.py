"""Measured peak memory of training steps, compared with what --dry_run predicts.

A process's peak never falls, so sizes are measured in ascending order."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from beyond_outliers import hardware
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.bench.accelerator.utilization import STARTS, TINY, Setting
from beyond_outliers.bench.random_steps import steps_of
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.train import describe
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json

ASCENDING = {"full": ("125m", "350m"), "tiny": (TINY,)}


def part_rows(scale: str, found: Found) -> Rows:
  del found
  for size in ASCENDING[scale]:
    yield size.partition(",")[0], functools.partial(_measure, size, STARTS[scale][size])


def _measure(size: str, setting: Setting) -> Json:
  c = study_config("adamw", setting.argument(size))
  program = program_lib.build_program(c, jax.devices()[:1])
  with mesh_lib.use(program.mesh):
    compiled = program.compile_train_step()
    classes = describe.memory_classes(program, compiled)
    hardware.seconds_of(steps_of(program, compiled), 2)
  return {
    "setting": setting,
    "predicted_bytes": sum(classes.values()),
    "classes": classes,
    "measured_bytes": hardware.memory_bytes() if jax.default_backend() != "cpu" else None,
  }


def cells(found: Found, others: Mapping[str, Found]) -> Cells:
  del others
  shown = []
  for name, row in found.items():
    predicted, measured = row["predicted_bytes"], row["measured_bytes"]
    figure = f"predicted {predicted / 2**20:,.1f} MiB"
    if measured:
      figure += f", measured {measured / 2**20:,.1f}: {measured / predicted:.2f} times"
    else:
      figure += ", and a CPU's process has no counter of its own"
    shown.append((f"step of {name}", figure, ""))
  return shown
