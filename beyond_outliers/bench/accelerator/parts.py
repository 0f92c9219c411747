"""The check's parts: what each measures, how it is shown, and how long it may use the chip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from beyond_outliers.bench.accelerator import (
  ceilings,
  correctness,
  memory,
  quantization,
  resume,
  updates,
  utilization,
)
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows

# Of models and arrays; tiny: the whole check in a minute or two on a CPU.
CHECK_SCALES = ("full", "tiny")


class CheckPart(NamedTuple):
  """One part, measured in a process of its own."""

  # (row of CHECK_SCALES, what rows so far gave) -> those that follow
  rows: Callable[[str, Found], Rows]
  cells: Callable[[Found, Mapping[str, Found]], Cells]  # (its figures, those of parts by name)
  seconds: int  # of eight minutes, that parts before it leave to it; what these don't take, it has
  xla_flags: str = ""


CHECK_PARTS: dict[str, CheckPart] = {
  "ceilings": CheckPart(ceilings.part_rows, ceilings.cells, 20),
  "correctness": CheckPart(correctness.part_rows, correctness.cells, 70),
  "utilization": CheckPart(utilization.part_rows, utilization.cells, 130),
  "updates": CheckPart(updates.part_rows, updates.cells, 85),
  "recipes": CheckPart(quantization.recipe_rows, quantization.recipe_cells, 70),
  "memory": CheckPart(memory.part_rows, memory.cells, 25),
  "evaluation": CheckPart(quantization.evaluation_rows, quantization.evaluation_cells, 50),
  # Without it XLA sums what is scattered, as the embedding's gradient, in any order on a GPU.
  "resume": CheckPart(resume.part_rows, resume.cells, 30, "--xla_gpu_deterministic_ops=true"),
}
