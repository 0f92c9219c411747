"""Seconds and memory of decomposing quantization error, relative to the two forward passes.

python -m beyond_outliers.bench --propagation=50m [--json]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from beyond_outliers import hardware, quant
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.types import Json

RECIPE = "rtn_w4a4"
WINDOWS = 8


def measure_propagation(size: str) -> Json:
  """Seconds of both forwards and of each analysis, the first time with compilation and the second;
  and the process's peak memory after each. Random weights and tokens."""
  from beyond_outliers.analysis import propagation  # imports pandas, which other benches don't need

  c = study_config("adamw", f"{size},model.dtype=float32")
  model = transformer.Transformer(c.model)
  params = jax.jit(lambda: transformer.init(model, c.seed))()
  draw = np.random.default_rng(c.seed)
  tokens_BxL = draw.integers(0, c.model.vocab, (WINDOWS, c.context)).astype(np.int32)
  q = quant.quantized(model, params, quant.RECIPES[RECIPE])
  models = (model, params), (q.model, q.params)
  # Jitted once, since every new function would be compiled again.
  forwards = [jax.jit(of_run.apply) for of_run, _ in models]

  def both_forwards() -> Any:
    return [
      jax.block_until_ready(forward({"params": of_run}, window[None]))[0, 0, 0]
      for forward, (_, of_run) in zip(forwards, models, strict=True)
      for window in tokens_BxL
    ]

  analyses: dict[str, Callable[[], Any]] = {
    "both forwards": both_forwards,
    "final_error": lambda: propagation.final_error(model, params, q, [{"tokens": tokens_BxL}]),
    "decompose": lambda: propagation.decompose(model, params, q, [{"tokens": tokens_BxL}]),
  }
  rows: dict[str, Json] = {}
  for name, run in analyses.items():
    first, second = _seconds(run), _seconds(run)
    rows[name] = {
      "first_seconds": first,
      "seconds": second,
      "peak_memory_bytes": hardware.memory_bytes(),
    }
    print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
  return {
    "size": c.size,
    "recipe": RECIPE,
    "tokens": int(tokens_BxL.size),
    "units": len(propagation.decompose(model, params, q, [{"tokens": tokens_BxL[:1]}])),
    "rows": rows,
  }


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def propagation_table(result: Mapping[str, Any]) -> str:
  """One line per analysis, in seconds and relative to both forwards."""
  rows = result["rows"]
  forwards = rows["both forwards"]["seconds"]
  return "\n".join(
    [
      f"{result['size']}, {result['recipe']}, {result['tokens']:,} tokens, {result['units']} units",
      f"{'':<16}{'compiling':>11}{'again':>9}{'forwards':>10}{'peak memory':>14}",
      *(
        f"{name:<16}{row['first_seconds']:>9.1f} s{row['seconds']:>7.1f} s"
        f"{row['seconds'] / forwards:>10.1f}{row['peak_memory_bytes'] / 2**20:>10,.0f} MiB"
        for name, row in rows.items()
      ),
    ]
  )
