"""MFU of training steps: a search over attention, rematerialisation and windows per micro-batch.

Each setting is timed as a whole step of configs/adamw.py, compiled as by the trainer, with
MICRO_BATCHES micro-batches on one device. The study's step has more of them per update, so its MFU
is slightly higher.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from beyond_outliers import hardware
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.bench.random_steps import steps_of
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.train import describe
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json

TINY = "nano,model.d_head=8,context=32,model.blocks=1,data.vocab=256"
MICRO_BATCHES = 8  # per step
AIM = 0.5
AIMED_AT = ("350m", "760m")


class Setting(NamedTuple):
  """What the search varies."""

  attention: str
  remat: str
  windows: int  # per micro-batch

  def argument(self, size: str) -> str:
    """The argument for configs/adamw.py, for steps of one micro-batch."""
    switches = f"model.attention={self.attention},model.remat={self.remat}"
    return f"{size},{switches},batch_size={self.windows}"


# Start of the search for each size: the setting expected to be best. Sizes with an aim come first.
STARTS = {
  "full": {
    "760m": Setting("fused", "none", 8),
    "350m": Setting("fused", "none", 16),
    "125m": Setting("fused", "none", 32),
    "50m": Setting("fused", "none", 32),
  },
  "tiny": {TINY: Setting("blockwise", "none", 1)},
}
# Windows are multiples of the best setting's so far.
ALTERNATIVES: dict[str, dict[str, tuple[Any, ...]]] = {
  "full": {"windows": (2, 0.5), "attention": ("blockwise", "plain"), "remat": ("dots", "full")},
  "tiny": {},
}
TIMED_STEPS = {"full": 3, "tiny": 1}


def part_rows(scale: str, found: Found) -> Rows:
  """Each size's first setting; then single changes to the best so far."""
  starts, repeats = STARTS[scale], TIMED_STEPS[scale]

  def row(size: str, setting: Setting) -> tuple[str, Callable[[], Json]]:
    measure = functools.partial(measure_setting, size, setting, repeats)
    return "/".join((size, *map(str, setting))), measure

  for size, setting in starts.items():
    yield row(size, setting)
  for field, values in ALTERNATIVES[scale].items():
    for size, setting in starts.items():
      for value in values:
        best = best_of(found, size)
        base = Setting(*best["setting"]) if best else setting
        changed: Any = int(base.windows * value) if field == "windows" else value
        changes: dict[str, Any] = {**base._asdict(), field: changed}
        yield row(size, Setting(**changes))


def measure_setting(size: str, setting: Setting, repeats: int) -> Json:
  """Seconds of a step, its predicted memory, and its share of the peak."""
  argument = setting._replace(windows=setting.windows * MICRO_BATCHES).argument(size)
  c = study_config("adamw", f"{argument},micro_batches={MICRO_BATCHES}")
  program = program_lib.build_program(c, jax.devices()[:1])
  with mesh_lib.use(program.mesh):
    start = time.perf_counter()
    compiled = program.compile_train_step()
    compile_seconds = time.perf_counter() - start
    seconds = hardware.median_seconds(steps_of(program, compiled), repeats)
  tokens = c.batch_size * c.context
  flops = tokens * transformer.flops_per_token(c.model, c.context) / seconds
  peak, source = hardware.peak_flops(c.model.dtype)
  return {
    "size": size,
    "setting": setting,
    "dtype": c.model.dtype,
    "seconds": seconds,
    "compile_seconds": compile_seconds,
    "tokens_per_second": tokens / seconds,
    "flops_per_second": flops,
    "mfu": flops / peak,
    "peak_source": source,
    "predicted_bytes": sum(describe.memory_classes(program, compiled).values()),
  }


def best_of(found: Found, size: str) -> Json | None:
  """Figures of the fastest setting of a size; None if none ran."""
  those = [row for row in found.values() if row.get("size") == size]
  return max(those, key=lambda row: row["mfu"]) if those else None


def cells(found: Found, others: Mapping[str, Found]) -> Cells:
  """Lines of the table: the best setting of each size, and how many were tried."""
  ceiling = others.get("ceilings", {}).get("product/bfloat16", {}).get("flops_per_second")
  shown = []
  for size in dict.fromkeys(row["size"] for row in found.values()):
    best = best_of(found, size)
    assert best
    attention, remat, windows = best["setting"]
    tried = sum(row["size"] == size for row in found.values())
    measured = f", {best['flops_per_second'] / ceiling:.0%} of the product" if ceiling else ""
    aim = f"≥ {AIM:.0%}, {'met' if best['mfu'] >= AIM else 'missed'}" if size in AIMED_AT else ""
    what = (
      f"{size.partition(',')[0]}, best of {tried}: {attention}, remat {remat}, {windows} windows"
    )
    speed = f"{best['tokens_per_second']:,.0f} tokens/s"
    shown.append((what, f"MFU {best['mfu']:.1%}{measured}; {speed}", aim))
  return shown
