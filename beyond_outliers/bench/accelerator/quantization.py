"""Quantized steps compared with full precision, quantization after training, and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from beyond_outliers import hardware, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import ptq, recipes
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.bench.accelerator.utilization import TINY
from beyond_outliers.bench.random_steps import random_batch
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.evaluate import steps
from beyond_outliers.model import transformer
from beyond_outliers.model.forward import make_forward
from beyond_outliers.train import program as program_lib
from beyond_outliers.types import Json

# Arguments for configs/adamw.py: loss and gradients of one micro-batch are timed.
QUANTIZED_STEPS = {
  "full": "350m,batch_size=8,model.attention=fused",
  "tiny": f"{TINY},batch_size=1",
}
STEP_RECIPES = {
  "full": ("quest_w4a4", "rtn_w8a8", "fp8", "nvfp4", "mxfp4", "int8_gradients"),
  "tiny": ("quest_w4a4",),
}
AIMS = {"quest_w4a4": 1.3}
EVALUATED_MODELS = {"full": "125m", "tiny": TINY}  # quantized and evaluated
TIMED_METHODS = {"full": ("rtn", "gptq"), "tiny": ("rtn",)}
EVALUATED = {"full": "batch_size=32,model.attention=fused", "tiny": "batch_size=1"}
CALLS = {"full": 5, "tiny": 1}


def recipe_rows(scale: str, found: Found) -> Rows:
  del found
  for name in STEP_RECIPES[scale]:
    yield name, functools.partial(recipes.measure_model, QUANTIZED_STEPS[scale], name, CALLS[scale])


def recipe_cells(found: Found, others: Mapping[str, Found]) -> Cells:
  del others
  shown = []
  for name, row in found.items():
    times = f"{1e3 * row['seconds']:,.1f} ms, plain {1e3 * row['plain_seconds']:,.1f}"
    aim, ratio = AIMS.get(name) if row["dtype"] == "bfloat16" else None, row["ratio"]
    said = f"≤ {aim} ×, {'met' if ratio <= aim else 'missed'}" if aim else ""
    shown.append((f"{name} over plain, {row['dtype']}", f"{ratio:.2f} × ({times})", said))
  return shown


def evaluation_rows(scale: str, found: Found) -> Rows:
  del found
  model = EVALUATED_MODELS[scale]
  yield "evaluation", functools.partial(_evaluate, f"{model},{EVALUATED[scale]}", CALLS[scale])
  for method in TIMED_METHODS[scale]:
    yield method, functools.partial(_quantize, model, method)


def _quantize(size: str, method: str) -> Json:
  figures = ptq.measure_ptq(size, [method])
  row = figures.pop("rows")[method]
  return {**figures, **row}


def _evaluate(argument: str, repeats: int) -> Json:
  """Tokens per second of the evaluation step, in full precision and for the model quantized by
  `rtn`."""
  c = study_config("adamw", argument)
  program = program_lib.build_program(c, jax.devices()[:1])
  with mesh_lib.use(program.mesh):
    params, batch = transformer.init(program.model, c.seed), random_batch(program)
    q = quant.quantized(program.model, params, quant.RECIPES[ptq.RECIPE])
    quantized = jax.jit(steps.make_eval_step(make_forward(q.model, c.data.mask_documents)))
    seconds = {
      "none": hardware.median_seconds(lambda: program.eval_step(params, batch), repeats),
      ptq.RECIPE: hardware.median_seconds(lambda: quantized(q.params, batch), repeats),
    }
  tokens = c.batch_size * c.context
  rates = {name: tokens / each for name, each in seconds.items()}
  return {"argument": argument, "dtype": c.model.dtype, "tokens_per_second": rates}


def evaluation_cells(found: Found, others: Mapping[str, Found]) -> Cells:
  del others
  shown = []
  for name, row in found.items():
    if name == "evaluation":
      rates = ", ".join(f"{each} {rate:,.0f}" for each, rate in row["tokens_per_second"].items())
      size = row["argument"].partition(",")[0]
      shown.append((f"evaluating {size}, {row['dtype']}", f"tokens/s: {rates}", ""))
      continue
    peak = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB at most so far"
    calibration = f"{row['calibration_tokens']:,} tokens"
    figure = f"{row['seconds']:.1f} s with compiling, {calibration}, {peak}"
    shown.append((f"{name} of {row['size']}, {row['recipe']}", figure, ""))
  return shown
