"""The best that the chip reaches: large products back to back, and copies within its memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from beyond_outliers import hardware
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.types import Json

COPIED_BYTES = {"full": 2**32, "tiny": 2**26}
DTYPES = ("bfloat16", "float32")


def part_rows(scale: str, found: Found) -> Rows:
  del found
  for dtype in DTYPES:
    yield f"product/{dtype}", functools.partial(_product, dtype)
  yield "copy", functools.partial(_copy, COPIED_BYTES[scale])


def _product(dtype: str) -> Json:
  kind, bfloat16 = jax.devices()[0].device_kind, dtype == "bfloat16"
  sheet = hardware.BFLOAT16_PEAKS.get(kind) if bfloat16 else None
  return {"flops_per_second": hardware.measure_matmul(dtype), "data_sheet": sheet}


def _copy(count: int) -> Json:
  return {"bytes_per_second": hardware.measure_copy(count), "copied_bytes": count}


def cells(found: Found, others: Mapping[str, Found]) -> Cells:
  del others
  shown = []
  for name, row in found.items():
    if name == "copy":
      shown.append((name, f"{row['bytes_per_second'] / 1e9:,.0f} GB/s, read and written", ""))
      continue
    sheet = row["data_sheet"]
    share = f", {row['flops_per_second'] / sheet:.0%} of the data sheet" if sheet else ""
    shown.append((name, f"{row['flops_per_second'] / 1e12:,.2f} TFLOP/s{share}", ""))
  return shown
