"""Seconds and memory of post-training quantization, by method, on random weights and tokens.

python -m beyond_outliers.bench --ptq=50m [--only=rtn,gptq] [--json]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from beyond_outliers import hardware, quant
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.types import Json

RECIPE = "rtn_w4a4"
WINDOWS = 16  # for calibration, each a batch of its own


def measure_ptq(size: str, methods: Sequence[str]) -> Json:
  """Seconds of every method, compilation included, and the process's peak memory so far."""
  c = study_config("adamw", f"{size},model.dtype=float32")
  model = transformer.Transformer(c.model)
  params = jax.jit(lambda: transformer.init(model, c.seed))()
  draw = np.random.default_rng(c.seed)
  batches = [
    {"tokens": draw.integers(0, c.model.vocab, (1, c.context)).astype(np.int32)}
    for _ in range(WINDOWS)
  ]
  result: Json = {
    "size": c.size,
    "dtype": c.model.dtype,
    "recipe": RECIPE,
    "calibration_tokens": WINDOWS * c.context,
    "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
    "rows": {},
  }
  for method in methods:
    jax.clear_caches()
    start = time.perf_counter()
    q = quant.ptq.quantize(model, params, quant.RECIPES[RECIPE], method, batches)
    jax.block_until_ready(q.params)
    row = {"seconds": time.perf_counter() - start, "peak_memory_bytes": hardware.memory_bytes()}
    print(f"{method}: {row}", file=sys.stderr, flush=True)
    result["rows"][method] = row
  return result


def ptq_table(result: Mapping[str, Any]) -> str:
  """One line per method, and their sum."""
  rows = result["rows"]
  return "\n".join(
    [
      f"{result['size']}, {result['dtype']}, "
      f"{result['parameter_bytes'] / 2**20:,.0f} MiB of parameters · "
      f"{result['recipe']} · {result['calibration_tokens']:,} tokens of calibration",
      f"{'':<20}{'seconds':>9}{'peak memory':>14}",
      *(
        f"{name:<20}{row['seconds']:>9.1f}{row['peak_memory_bytes'] / 2**20:>10,.0f} MiB"
        for name, row in rows.items()
      ),
      f"{'all':<20}{sum(row['seconds'] for row in rows.values()):>9.1f}",
    ]
  )
