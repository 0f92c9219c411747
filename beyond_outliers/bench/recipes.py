"""Costs of quantization relative to full precision on this machine, and the dtypes of a layer's
products on GPU and TPU.

  python -m beyond_outliers.bench --recipes [--only=quest_w4a4,rtn_w8a8] [--repeats=5] [--json]

Two tables: one linear layer, and the loss and gradients of whole models. Calls of a recipe's
program alternate with calls of the plain one, and ratios are medians over such pairs, so that other
load on the machine slows both. Prefix `taskset -c 0` to measure one core.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from beyond_outliers import cli, hardware, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import linear_layer
from beyond_outliers.bench.random_steps import random_batch
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.model import transformer
from beyond_outliers.quant.backends import aqt as aqt_backend
from beyond_outliers.train import program as program_lib
from beyond_outliers.train import step as step_lib
from beyond_outliers.types import Json

# All recipes that quantize, and those that are measured by default.
LAYER_RECIPES = {name: recipe.default for name, recipe in quant.RECIPES.items() if recipe.default}
DEFAULT = (
  "rtn_w8a8",
  "rtn_w4a4",
  "quest_w4a4",
  "quest_w8a8",
  "int8_gradients",
  "lsq_w4a4",
  "fp8",
  "mxfp4",
  "nvfp4",
  "rtn_w4a16_g128",
)


class TimedModel(NamedTuple):
  """A whole model that is timed."""

  argument: str  # for configs/adamw.py
  recipes: tuple[str, ...]
  repeats: int  # at most


MODELS = {
  "nano": TimedModel("nano", ("quest_w4a4", "rtn_w8a8", "int8_gradients"), 5),
  "50m": TimedModel("50m,batch_size=2,model.dtype=float32", ("quest_w4a4", "rtn_w8a8"), 2),
}


def by_turns(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> dict[str, float]:
  """Median seconds of two alternating calls, and the median of their ratios.

  A first call of each is not counted."""
  jax.block_until_ready((first(), second()))
  times = [
    (*hardware.seconds_of(first, 1), *hardware.seconds_of(second, 1)) for _ in range(repeats)
  ]
  ones, others = zip(*times, strict=True)
  return {
    "plain_seconds": statistics.median(ones),
    "seconds": statistics.median(others),
    "ratio": statistics.median(other / one for one, other in times),
  }


def memory(ours: jax.stages.Compiled, base: jax.stages.Compiled) -> dict[str, int]:
  """Bytes of both compiled programs: temporaries, and their sum with arguments and results."""
  figures = {}
  for prefix, compiled in (("", ours), ("plain_", base)):
    m: Any = compiled.memory_analysis()
    figures[prefix + "temporary_bytes"] = m.temp_size_in_bytes
    figures[prefix + "peak_bytes"] = (
      m.temp_size_in_bytes
      + m.argument_size_in_bytes
      + m.output_size_in_bytes
      - m.alias_size_in_bytes
    )
  return figures


def measure_layer(name: str, backend: str, dtype: str, repeats: int) -> Json:
  """One row of the layer's table: the forward pass, and forward and backward together."""
  base = linear_layer.plain_layer()
  ours = linear_layer.quantized_layer(LAYER_RECIPES[name], backend)
  x, w, key, g = linear_layer.operands(dtype)
  row: Json = {
    "recipe": name,
    "backend": backend,
    "dtype": dtype,
    "products": linear_layer.product_types(ours, dtype),
  }
  for part, change, arguments in (
    ("forward", lambda layer: layer, (x, w, key)),
    ("both", linear_layer.with_gradients, (x, w, key, g)),
  ):
    calls = [
      (_compiled(change(layer).apply, layer.params, *arguments), layer.params)
      for layer in (base, ours)
    ]
    (plain_program, nothing), (program, params) = calls
    row[part] = by_turns(
      functools.partial(plain_program, nothing, *arguments),
      functools.partial(program, params, *arguments),
      repeats,
    ) | memory(program, plain_program)
  return row


def _compiled(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
  return jax.jit(function).lower(*arguments).compile()


def measure_models(name: str, recipes: Iterable[str], repeats: int) -> list[Json]:
  """Rows of the models' table."""
  rows, model = [], MODELS[name]
  for recipe in recipes:
    row = measure_model(model.argument, recipe, min(repeats, model.repeats))
    rows.append({"model": name, **row})
    _say(rows[-1])
  return rows


def measure_model(argument: str, recipe: str, repeats: int) -> Json:
  """Loss and gradients of configs/adamw.py under a recipe, compared with full precision. No recipe
  changes the rest of the step."""
  base, arguments = _plain(argument)
  program = _program(argument, recipe)
  compiled, c = _loss_and_gradients(program), program.config
  with mesh_lib.use(program.mesh):
    times = by_turns(
      functools.partial(base, *arguments), functools.partial(compiled, *arguments), repeats
    )
  row = {"recipe": recipe, "dtype": c.model.dtype, "tokens": c.batch_size * c.context}
  return row | times | memory(compiled, base)


@functools.lru_cache(1)
def _plain(argument: str) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
  """(compiled loss and gradients in full precision, their arguments)."""
  program = _program(argument, "none")
  with mesh_lib.use(program.mesh):
    params = transformer.init(program.model, program.config.seed)
    arguments = params, random_batch(program), jax.random.key(0)
  return _loss_and_gradients(program), arguments


def _program(argument: str, recipe: str) -> program_lib.Program:
  c = study_config("adamw", f"{argument},quant.recipe={recipe}")
  return program_lib.build_program(c, jax.devices()[:1])


def _loss_and_gradients(program: program_lib.Program) -> jax.stages.Compiled:
  loss_fn = step_lib.make_loss_fn(program.forward)
  with mesh_lib.use(program.mesh):
    return _compiled(
      step_lib.accumulate(loss_fn, program.config.micro_batches),
      program.state.params,
      program.batch,
      jax.eval_shape(lambda: jax.random.key(0)),
    )


def measure_recipes(names: Sequence[str], repeats: int) -> Json:
  """All figures: seconds, bytes. In bfloat16, only of the first backend that has the recipe."""
  layers = []
  for name in names:
    able = [
      backend
      for backend in quant.BACKENDS
      if backend != "aqt" or aqt_backend.expresses(LAYER_RECIPES[name])
    ]
    for backend, dtype in [*((backend, "float32") for backend in able), (able[0], "bfloat16")]:
      layers.append(measure_layer(name, backend, dtype, repeats))
      _say(layers[-1])
  models = [
    row
    for model, (_, recipes, _) in MODELS.items()
    if (measured := [name for name in recipes if name in names])
    for row in measure_models(model, measured, repeats)
  ]
  return {
    "device": jax.devices()[0].device_kind,
    "repeats": repeats,
    "layers": layers,
    "models": models,
  }


def _say(row: Mapping[str, Any]) -> None:
  print(row, file=sys.stderr, flush=True)


LAYER_HEAD = (
  *("recipe", "backend", "dtype"),
  *("forward ms", "plain", "×"),
  *("and backward ms", "plain", "×"),
  *("MiB temporary", "plain", "peak ×"),
  *("forward", "dx", "dw"),
)
MODEL_HEAD = (
  *("model", "recipe", "dtype", "tokens"),
  *("ms", "plain", "×"),
  *("MiB temporary", "plain", "×", "peak ×"),
)


def recipes_table(result: Mapping[str, Any]) -> str:
  """Two tables: the layer's, and the models'."""
  tokens, inputs, outputs = linear_layer.TOKENS, linear_layer.INPUTS, linear_layer.OUTPUTS
  title = (
    f"one linear layer, {tokens:,} tokens, {inputs} -> {outputs}, on {result['device']}; "
    "types of its products as lowered for GPU and TPU"
  )
  layers = cli.aligned([LAYER_HEAD, *map(_layer_cells, result["layers"])])
  models = cli.aligned([MODEL_HEAD, *map(_model_cells, result["models"])])
  return "\n".join([title, *layers, "", "loss and gradients of a step", *models])


def _layer_cells(row: Mapping[str, Any]) -> list[str]:
  forward, both = row["forward"], row["both"]
  return [
    *(row["recipe"], row["backend"], row["dtype"]),
    *_times(forward),
    *_times(both),
    *_temporaries(both),
    _peak(both),
    *row["products"].values(),  # forward, dx, dw
  ]


def _model_cells(row: Mapping[str, Any]) -> list[str]:
  return [
    *(row["model"], row["recipe"], row["dtype"], f"{row['tokens']:,}"),
    *_times(row),
    *_temporaries(row),
    f"{row['temporary_bytes'] / row['plain_temporary_bytes']:.2f}",
    _peak(row),
  ]


def _times(figures: Mapping[str, Any]) -> list[str]:
  milliseconds = [f"{1e3 * figures[name]:,.1f}" for name in ("seconds", "plain_seconds")]
  return [*milliseconds, f"{figures['ratio']:.2f}"]


def _temporaries(figures: Mapping[str, Any]) -> list[str]:
  return [f"{figures[name] / 2**20:,.1f}" for name in ("temporary_bytes", "plain_temporary_bytes")]


def _peak(figures: Mapping[str, Any]) -> str:
  return f"{figures['peak_bytes'] / figures['plain_peak_bytes']:.2f}"
