"""What quantizing a model costs after its training: one method after another, on random weights and
tokens.

python -m beyond_outliers.bench --ptq=50m [--only=rtn,gptq] [--json]
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from beyond_outliers import config, hardware, quant
from beyond_outliers.model import transformer

RECIPE = "rtn_w4a4"
WINDOWS = 16  # of calibration, a batch each


def run(size: str, methods: Sequence[str]) -> dict[str, Any]:
  """Seconds of every method, compiling all that it runs, and the process's peak memory so far."""
  c = config.resolve(
    importlib.import_module("configs.adamw").get_config(f"{size},model.dtype=float32")
  )
  model = transformer.Transformer(c.model)
  params = jax.jit(lambda: transformer.init(model, c.seed))()
  draw = np.random.default_rng(c.seed)
  batches = [
    {"tokens": draw.integers(0, c.model.vocab, (1, c.context)).astype(np.int32)}
    for _ in range(WINDOWS)
  ]
  result: dict[str, Any] = {
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


def table(result: Mapping[str, Any]) -> str:
  """The figures for a person."""
  mebi = lambda size: f"{size / 2**20:,.0f} MiB"
  lines = [
    f"{result['size']}, {result['dtype']}, {mebi(result['parameter_bytes'])} of parameters · "
    f"{result['recipe']} · "
    f"{result['calibration_tokens']:,} tokens of calibration",
    f"{'':<20}{'seconds':>9}{'peak memory':>14}",
  ]
  lines += [
    f"{name:<20}{row['seconds']:>9.1f}{mebi(row['peak_memory_bytes']):>14}"
    for name, row in result["rows"].items()
  ]
  return "\n".join(
    [*lines, f"{'all':<20}{sum(row['seconds'] for row in result['rows'].values()):>9.1f}"]
  )
