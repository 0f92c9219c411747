"""Whether a run resumed from a checkpoint equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Mapping

import jax
import numpy as np

from beyond_outliers import config
from beyond_outliers.bench.accelerator import nano
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.types import Json

STEPS = 6
# row -> changes to nano; without any, losses are compared with the recorded ones.
RESUMED = {"nano": "", "nano, quest_w4a4": "quant.recipe=quest_w4a4"}


def part_rows(scale: str, found: Found) -> Rows:
  del found
  for name, change in RESUMED.items():
    if scale == "full" or not change:
      yield name, functools.partial(_resume, scale, change)


def _resume(scale: str, change: str) -> Json:
  """Compares STEPS steps in one go with two halves, by two programs, with a checkpoint between."""
  from beyond_outliers import checkpoint  # imports Orbax, which takes a second, for this part only

  whole, losses = nano.train(nano.nano_program(scale, change), STEPS)
  expected = jax.device_get(whole)
  del whole
  first, _ = nano.train(nano.nano_program(scale, change), STEPS // 2)
  with tempfile.TemporaryDirectory() as folder:
    keep = checkpoint.Checkpoints(pathlib.Path(folder, "N"), config.Checkpoint(1, 1, 0, True))
    keep.save(STEPS // 2, first, {}, {"seconds": 0.0})
    keep.wait()
    del first
    program = nano.nano_program(scale, change)
    found = keep.restore(program.state)
    keep.close()
  assert found
  last, _ = nano.train(program, STEPS - STEPS // 2, found[1])
  leaves = zip(jax.tree.leaves(jax.device_get(last)), jax.tree.leaves(expected), strict=True)
  differing = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in leaves)
  figures: Json = {"arrays_that_differ": differing, "losses": losses, "right": not differing}
  if not change:
    recorded, tolerance = nano.recorded_losses(scale)
    error = float(np.abs(np.subtract(losses, recorded[:STEPS])).max())
    figures |= {"error": error, "tolerance": tolerance}
    figures["right"] &= error <= tolerance
  return figures


def cells(found: Found, others: Mapping[str, Found]) -> Cells:
  del others
  shown = []
  for name, row in found.items():
    figure = f"{row['arrays_that_differ']} arrays differ"
    if "error" in row:
      figure += f"; losses off by {row['error']:.1e} (≤ {row['tolerance']:.1e})"
    verdict = "met" if row["right"] else "MISSED"
    shown.append((f"{name}, {STEPS} steps", figure, f"0 arrays, {verdict}"))
  return shown
