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

# Sizes of models and arrays; tiny runs the whole check in a minute or two on a CPU.
CHECK_SCALES = ("full", "tiny")


class CheckPart(NamedTuple):
  """One part, measured in a process of its own."""

  # (row of CHECK_SCALES, figures of the rows so far) -> all rows
  rows: Callable[[str, Found], Rows]
  cells: Callable[[Found, Mapping[str, Found]], Cells]  # (its figures, all parts' by name)
  seconds: int  # of eight minutes, reserved for it; it also gets what earlier parts don't use
  xla_flags: str = ""


CHECK_PARTS: dict[str, CheckPart] = {
  "ceilings": CheckPart(ceilings.part_rows, ceilings.cells, 20),
  "correctness": CheckPart(correctness.part_rows, correctness.cells, 70),
  "utilization": CheckPart(utilization.part_rows, utilization.cells, 130),
  "updates": CheckPart(updates.part_rows, updates.cells, 85),
  "recipes": CheckPart(quantization.recipe_rows, quantization.recipe_cells, 70),
  "memory": CheckPart(memory.part_rows, memory.cells, 25),
  "evaluation": CheckPart(quantization.evaluation_rows, quantization.evaluation_cells, 50),
  # Without the flag, XLA adds up scatters, such as the embedding's gradient, in any order on a GPU.
  "resume": CheckPart(resume.part_rows, resume.cells, 30, "--xla_gpu_deterministic_ops=true"),
}
