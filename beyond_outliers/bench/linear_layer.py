"""A linear layer in full precision and under a recipe: gradients, and the dtypes of its products.

Legend: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import quant
from beyond_outliers.ops import dot

TOKENS, INPUTS, OUTPUTS = 2048, 768, 2304
DIMENSION_NUMBERS = (((1,), (0,)), ((), ()))
# Shape of a result -> product; dw has two, as AQT transposes it afterwards.
PRODUCTS: dict[tuple[int, ...], str] = {
  (TOKENS, OUTPUTS): "forward",
  (TOKENS, INPUTS): "dx",
  (INPUTS, OUTPUTS): "dw",
  (OUTPUTS, INPUTS): "dw",
}


class Layer(NamedTuple):
  """One linear layer.

  apply: (params, x [T, K], w [K, O], key) -> y [T, O]; params: learned scales, or nothing."""

  apply: Callable[..., Any]
  params: Any


def plain_layer() -> Layer:
  """The layer in full precision, as in a model."""
  return Layer(lambda params, x, w, key: dot.dot_general(x, w, DIMENSION_NUMBERS), {})


def quantized_layer(recipe: quant.LayerRecipe, backend: str) -> Layer:
  """The layer under a recipe, with learned scales initialized from the operands."""
  maker: Any = quant.dot_general_for(quant.Recipe(((".*", recipe),)), backend)("layer")
  x, w, key, _ = operands("float32")
  params = jax.jit(
    lambda: maker().init({"params": key, "rounding": key}, x, w, DIMENSION_NUMBERS)
  )()
  return Layer(
    lambda params, x, w, key: maker().apply(
      params, x, w, DIMENSION_NUMBERS, rngs={"rounding": key}
    ),
    params,
  )


def with_gradients(layer: Layer) -> Layer:
  """The layer with y's gradient as a last argument, returning (y, gradients of params, x and w)."""

  def both(params, x_TxK, w_KxO, key, g_TxO):
    y_TxO, pullback = jax.vjp(
      lambda params, x, w: layer.apply(params, x, w, key), params, x_TxK, w_KxO
    )
    return y_TxO, *pullback(g_TxO.astype(y_TxO.dtype))

  return Layer(both, layer.params)


@functools.cache
def operands(dtype: str) -> tuple[jax.Array, ...]:
  """(x [T, K], w [K, O], key, y's gradient [T, O]).

  Activations are in `dtype`, the rest as in the trainer."""
  draw = np.random.default_rng(0)
  shapes = (TOKENS, INPUTS), (INPUTS, OUTPUTS), (TOKENS, OUTPUTS)
  x_TxK, w_KxO, g_TxO = (draw.standard_normal(shape, np.float32) for shape in shapes)
  return jnp.asarray(x_TxK, dtype), jnp.asarray(w_KxO), jax.random.key(0), jnp.asarray(g_TxO)


def product_types(layer: Layer, dtype: str) -> dict[str, str]:
  """Dtypes of the three products' operands and sums as lowered for GPU and TPU: {"forward":
  "i8·i8→i32", ...}; both if they differ.

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
