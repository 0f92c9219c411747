"""What quantization costs beside full precision on this machine, and which of a layer's products
are integer elsewhere.

  python -m beyond_outliers.bench --recipes [--only=quest_w4a4,rtn_w8a8] [--repeats=5] [--json]

Two tables: one linear layer, and the loss and gradients of whole models. Every call of a recipe's
program stands beside one of the plain program, and ratios are medians over such pairs, so that what
else the machine does slows both. `taskset -c 0` in front of it measures one core.

Legend: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

import functools
import importlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import cli, config, hardware, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.model import transformer
from beyond_outliers.ops import dot
from beyond_outliers.quant.backends import aqt as aqt_backend
from beyond_outliers.train import program as program_lib
from beyond_outliers.train import step as step_lib

TOKENS, INPUTS, OUTPUTS = 2048, 768, 2304
NUMBERS = (((1,), (0,)), ((), ()))
# All that quantize, and those that are measured unless others are asked for.
ROWS = {name: recipe.default for name, recipe in quant.RECIPES.items() if recipe.default}
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
# The product that a result of this shape belongs to; AQT transposes dw later.
PRODUCTS: dict[tuple[int, ...], str] = {
  (TOKENS, OUTPUTS): "forward",
  (TOKENS, INPUTS): "dx",
  (INPUTS, OUTPUTS): "dw",
  (OUTPUTS, INPUTS): "dw",
}


class Model(NamedTuple):
  """A whole model that is measured."""

  argument: str  # of configs/adamw.py
  recipes: tuple[str, ...]
  repeats: int  # at most


MODELS = {
  "nano": Model("nano", ("quest_w4a4", "rtn_w8a8", "int8_gradients"), 5),
  "50m": Model("50m,batch_size=2,model.dtype=float32", ("quest_w4a4", "rtn_w8a8"), 2),
}


class Layer(NamedTuple):
  """One linear layer. apply: (params, x [T, K], w [K, O], key) -> y [T, O]; params: learned scales,
  or nothing."""

  apply: Callable[..., Any]
  params: Any


def plain() -> Layer:
  return Layer(lambda params, x, w, key: dot.dot_general(x, w, NUMBERS), {})


def quantized(recipe: quant.LayerRecipe, backend: str) -> Layer:
  maker: Any = quant.dot_general_for(quant.Recipe(((".*", recipe),)), backend)("layer")
  x, w, key, _ = operands("float32")
  params = jax.jit(lambda: maker().init({"params": key, "rounding": key}, x, w, NUMBERS))()
  return Layer(
    lambda params, x, w, key: maker().apply(params, x, w, NUMBERS, rngs={"rounding": key}), params
  )


def with_gradients(layer: Layer) -> Layer:
  """The same with y's gradient as a last argument, returning (y, gradients of params, x and w)."""

  def both(params, x_TxK, w_KxO, key, g_TxO):
    y_TxO, pullback = jax.vjp(
      lambda params, x, w: layer.apply(params, x, w, key), params, x_TxK, w_KxO
    )
    return y_TxO, *pullback(g_TxO.astype(y_TxO.dtype))

  return Layer(both, layer.params)


@functools.cache
def operands(dtype: str) -> tuple[jax.Array, ...]:
  """(x [T, K], w [K, O], key, y's gradient [T, O]): activations in `dtype`, the rest as the trainer
  has it."""
  draw = np.random.default_rng(0)
  shapes = (TOKENS, INPUTS), (INPUTS, OUTPUTS), (TOKENS, OUTPUTS)
  x_TxK, w_KxO, g_TxO = (draw.standard_normal(shape, np.float32) for shape in shapes)
  return jnp.asarray(x_TxK, dtype), jnp.asarray(w_KxO), jax.random.key(0), jnp.asarray(g_TxO)


def product_types(layer: Layer, dtype: str) -> dict[str, str]:
  """Operands and sums of the three products as lowered for GPU and TPU: {"forward": "i8·i8→i32",
  ...}; both where they differ.

  Nothing is compiled or run."""
  shapes = jax.eval_shape(lambda: (layer.params, *operands(dtype)))
  traced = jax.jit(with_gradients(layer).apply).trace(*shapes)
  found: dict[str, list[str]] = {"forward": [], "dx": [], "dw": []}
  for platform in ("cuda", "tpu"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for a, b, y in re.findall(
      r"dot_general .* : \(tensor<(.*?)>, tensor<(.*?)>\) -> tensor<(.*?)>", text
    ):
      *shape, total = y.split("x")
      product = PRODUCTS.get(tuple(map(int, shape)))
      if product:
        found[product].append(f"{a.split('x')[-1]}·{b.split('x')[-1]}→{total}")
  return {product: " | ".join(dict.fromkeys(types)) for product, types in found.items()}


def by_turns(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> dict[str, float]:
  """Median seconds of two calls by turns, and the median of their ratios; one of each before is not
  counted."""
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


def memory(ours: Any, base: Any) -> dict[str, int]:
  """Bytes of temporaries, and of these with arguments and results, of a compiled program and of the
  plain one."""
  figures = {}
  for prefix, compiled in (("", ours), ("plain_", base)):
    m = compiled.memory_analysis()
    figures[prefix + "temporary_bytes"] = m.temp_size_in_bytes
    figures[prefix + "peak_bytes"] = (
      m.temp_size_in_bytes
      + m.argument_size_in_bytes
      + m.output_size_in_bytes
      - m.alias_size_in_bytes
    )
  return figures


def measure_layer(name: str, backend: str, dtype: str, repeats: int) -> dict[str, Any]:
  """One row of the layer's table: forward, and forward with backward."""
  base, ours = plain(), quantized(ROWS[name], backend)
  x, w, key, g = operands(dtype)
  row: dict[str, Any] = {
    "recipe": name,
    "backend": backend,
    "dtype": dtype,
    "products": product_types(ours, dtype),
  }
  for part, change, arguments in (
    ("forward", lambda layer: layer, (x, w, key)),
    ("both", with_gradients, (x, w, key, g)),
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


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
  return jax.jit(function).lower(*arguments).compile()


def measure_models(name: str, recipes: Iterable[str], repeats: int) -> list[dict[str, Any]]:
  """Rows of the models' table: loss and gradients, which is the step but for an update that no
  recipe changes."""
  rows, base, arguments = [], None, ()
  for recipe in ("none", *recipes):
    c = config.resolve(
      importlib.import_module("configs.adamw").get_config(
        f"{MODELS[name].argument},quant.recipe={recipe}"
      )
    )
    program = program_lib.build(c, jax.devices()[:1])
    loss_fn = step_lib.make_loss_fn(program.forward)
    with mesh_lib.use(program.mesh):
      compiled = _compiled(
        step_lib.accumulate(loss_fn, c.micro_batches),
        program.state.params,
        program.batch,
        jax.eval_shape(lambda: jax.random.key(0)),
      )
      if base is None:
        base, arguments = (
          compiled,
          (transformer.init(program.model, c.seed), _batch(program), jax.random.key(0)),
        )
        continue
      row = {
        "model": name,
        "recipe": recipe,
        "dtype": c.model.dtype,
        "tokens": c.batch_size * c.context,
      }
      times = by_turns(
        functools.partial(base, *arguments),
        functools.partial(compiled, *arguments),
        min(repeats, MODELS[name].repeats),
      )
    rows.append(row | times | memory(compiled, base))
    _say(rows[-1])
  return rows


def _batch(program: program_lib.Program) -> dict[str, jax.Array]:
  """Random tokens."""
  draw, vocab = np.random.default_rng(0), program.config.model.vocab
  return {
    name: jnp.asarray(
      draw.integers(0, vocab, x.shape) if name in ("tokens", "targets") else np.ones(x.shape),
      x.dtype,
    )
    for name, x in program.batch.items()
  }


def run(names: Sequence[str], repeats: int) -> dict[str, Any]:
  """All figures: seconds, bytes. In bfloat16 only the backend that a run takes by default."""
  layers = []
  for name in names:
    able = [
      backend for backend in quant.BACKENDS if backend != "aqt" or aqt_backend.expresses(ROWS[name])
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


def table(result: Mapping[str, Any]) -> str:
  """The figures for a person."""
  milliseconds = lambda seconds: f"{1e3 * seconds:,.1f}"
  mebibytes = lambda count: f"{count / 2**20:,.1f}"
  peak = lambda figures: f"{figures['peak_bytes'] / figures['plain_peak_bytes']:.2f}"
  layers: list[tuple[str, ...]] = [
    (
      "recipe",
      "backend",
      "dtype",
      "forward ms",
      "plain",
      "×",
      "and backward ms",
      "plain",
      "×",
      "MiB temporary",
      "plain",
      "peak ×",
      "forward",
      "dx",
      "dw",
    )
  ]
  for row in result["layers"]:
    times = [
      cell
      for part in ("forward", "both")
      for figures in [row[part]]
      for cell in (
        milliseconds(figures["seconds"]),
        milliseconds(figures["plain_seconds"]),
        f"{figures['ratio']:.2f}",
      )
    ]
    both = row["both"]
    layers.append(
      (
        row["recipe"],
        row["backend"],
        row["dtype"],
        *times,
        mebibytes(both["temporary_bytes"]),
        mebibytes(both["plain_temporary_bytes"]),
        peak(both),
        *row["products"].values(),
      )
    )
  models = [
    (
      "model",
      "recipe",
      "dtype",
      "tokens",
      "ms",
      "plain",
      "×",
      "MiB temporary",
      "plain",
      "×",
      "peak ×",
    )
  ]
  for row in result["models"]:
    models.append(
      (
        row["model"],
        row["recipe"],
        row["dtype"],
        f"{row['tokens']:,}",
        milliseconds(row["seconds"]),
        milliseconds(row["plain_seconds"]),
        f"{row['ratio']:.2f}",
        mebibytes(row["temporary_bytes"]),
        mebibytes(row["plain_temporary_bytes"]),
        f"{row['temporary_bytes'] / row['plain_temporary_bytes']:.2f}",
        peak(row),
      )
    )
  title = (
    f"one linear layer, {TOKENS:,} tokens, {INPUTS} -> {OUTPUTS}, on {result['device']}; "
    "types of its products as lowered for GPU and TPU"
  )
  return "\n".join(
    [title, *cli.aligned(layers), "", "loss and gradients of a step", *cli.aligned(models)]
  )
