"""Whether this machine computes what a CPU does: models, quantized layers, products, training.

Our products ask for float32 explicitly, since recent GPUs and TPUs default to passes in TF32 and
bfloat16, which these checks would detect.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.bench import linear_layer
from beyond_outliers.bench.accelerator import golden, nano
from beyond_outliers.bench.accelerator.rows import Cells, Found, Rows
from beyond_outliers.bench.recipes import LAYER_RECIPES
from beyond_outliers.model import attention
from beyond_outliers.ops import int_dot
from beyond_outliers.types import Json

GOLDEN = {
  "full": [(name, how) for how in ("blockwise", "fused") for name in golden.GOLDEN_MODELS],
  "tiny": [("study", "blockwise")],
}
LAYERS = {"full": ("quest_w4a4", "rtn_w8a8", "fp8", "mxfp4", "nvfp4"), "tiny": ("quest_w4a4",)}
# ‖difference‖ over ‖expected‖. A rotated value midway between two codes may be rounded to either;
# neighbouring bfloat16 numbers are up to 8e-3 apart.
LAYER_TOLERANCE, ATTENTION_TOLERANCE = 1e-3, 1e-2
ATTENTION = {"full": (2, 1024, 6, 2, 128), "tiny": (1, 64, 3, 1, 16)}  # B, L, H, K, Dh
# T, K, O of int8 products: a layer's, odd ones, and one whose sums overflow int32.
INT8_SHAPES = {
  "full": [(2048, 1536, 6144), (33, 65, 17), (8, 2**18, 16)],
  "tiny": [(33, 65, 17), (8, 2**18, 16)],
}


def part_rows(scale: str, found: Found) -> Rows:
  del found
  for shape in INT8_SHAPES[scale]:
    yield f"int8 product {'×'.join(map(str, shape))}", functools.partial(_int8_product, *shape)
  yield f"nano, {nano.STEPS} steps", functools.partial(_nano, scale)
  for recipe in LAYERS[scale]:
    yield f"layer {recipe}", functools.partial(_layer, recipe)
  for how in attention.IMPLEMENTATIONS:
    yield f"attention {how}, bfloat16", functools.partial(_attention, how, *ATTENTION[scale])
  for name, how in GOLDEN[scale]:
    yield f"golden {name}, {how}", functools.partial(_golden, name, how)


def _verdict(error: float, tolerance: float, **figures: Any) -> Json:
  return {"error": error, "tolerance": tolerance, "right": error <= tolerance, **figures}


def _golden(name: str, how: str) -> Json:
  model = golden.GOLDEN_MODELS[name]("float32")
  pairs = golden.compared(model, dataclasses.replace(model.config, attention=how))
  errors = {part: golden.relative_error(*pair) for part, pair in pairs.items()}
  # NaN counts as the largest.
  worst = max(errors, key=lambda part: (not errors[part] <= np.inf, errors[part]))
  return _verdict(errors[worst], golden.FLOAT32_TOLERANCE, worst=worst)


def _distance(actual: Any, expected: Any) -> float:
  """The worst leaf's ‖difference‖ / ‖expected‖, of two trees of arrays; NaN if any leaf's is."""
  each = [
    np.linalg.norm(np.subtract(a, e, dtype=np.float64)) / np.linalg.norm(np.float64(e))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  ]
  return float(np.max(each))


def _here_and_on_cpu(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
  """Results of a function on this device and on a CPU, compiled for each."""
  results = []
  for device in (jax.devices()[0], jax.local_devices(backend="cpu")[0]):
    with jax.default_device(device):
      placed = jax.device_put(arguments, device)
      results.append(jax.device_get(jax.jit(function)(*placed)))
  return results[0], results[1]


def _layer(recipe: str) -> Json:
  """A linear layer's product and its gradients, in float32."""
  layer = linear_layer.quantized_layer(LAYER_RECIPES[recipe], "jax")
  x, w, key, g = linear_layer.operands("float32")
  both = linear_layer.with_gradients(layer).apply

  def product(params, x, w, g):
    return both(params, x, w, key, g)[-2:], both(params, x, w, key, g)[0]

  here, there = _here_and_on_cpu(product, layer.params, x, w, g)
  return _verdict(_distance(here, there), LAYER_TOLERANCE)


def _attention(how: str, B: int, L: int, H: int, K: int, Dh: int) -> Json:
  """Output and gradients in bfloat16, as in the study's models, against `plain` in float32."""
  draw = np.random.default_rng(0)
  shapes = (B, L, H, Dh), (B, L, K, Dh), (B, L, K, Dh), (B, L, H, Dh)
  narrow = [jnp.asarray(draw.standard_normal(shape), jnp.bfloat16) for shape in shapes]

  def both(implementation, q, k, v, g):
    y, pullback = jax.vjp(
      lambda *qkv: attention.attention(*qkv, implementation=implementation), q, k, v
    )
    return y, *pullback(g)

  q, *others = narrow
  narrow = [q / Dh**0.5, *others]
  ours = jax.jit(functools.partial(both, how))(*narrow)
  exact = jax.jit(functools.partial(both, "plain"))(*(x.astype(jnp.float32) for x in narrow))
  wide = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), ours)
  return _verdict(_distance(wide, jax.device_get(exact)), ATTENTION_TOLERANCE)


def _int8_product(T: int, K: int, N: int) -> Json:
  """Sums of products of codes, against float64's, which are exact; sums that int32 cannot hold are
  added up in float32."""
  draw = np.random.default_rng(0)
  a_TxK, b_KxN = (draw.integers(-128, 128, shape, np.int8) for shape in ((T, K), (K, N)))
  ours = jax.jit(lambda a, b: int_dot.dot_codes(a, b, 1, 0, jnp.int8))(a_TxK, b_KxN)
  exact = a_TxK.astype(np.float64) @ b_KxN.astype(np.float64)
  tolerance = 0.0 if K <= int_dot.LONGEST else 1e-6
  return _verdict(golden.relative_error(ours, exact), tolerance)


def _nano(scale: str) -> Json:
  expected, tolerance = nano.recorded_losses(scale)
  _, losses = nano.train(nano.nano_program(scale), nano.STEPS)
  error = float(np.abs(np.subtract(losses, expected)).max())
  return _verdict(error, tolerance, losses=losses)


def cells(found: Found, others: Mapping[str, Found]) -> Cells:
  del others
  return [
    (
      name,
      f"off by {row['error']:.1e}" + (f" ({row['worst']})" if "worst" in row else ""),
      f"≤ {row['tolerance']:.1e}, {'met' if row['right'] else 'MISSED'}",
    )
    for name, row in found.items()
  ]
