"""The quantized product of a linear layer in plain JAX, forward and backward, for any recipe.

Codes multiply codes, and scales are applied after the product wherever they are constant along the
axis that is summed over: products of integer codes are then exact in int32, and codes in bfloat16
lose nothing. With scales per block along that axis, operands are dequantized first.

Legend: T tokens, K contraction, O outputs; w is [K, O], or [O, K] with w_axis 1.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from beyond_outliers.ops.int_dot import dot_codes
from beyond_outliers.quant import quantizers, rotations
from beyond_outliers.quant.quantizers import Quantized, Saved
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec


def dot_general(
  x_TxK: jax.Array,
  w: jax.Array,
  w_axis: int,
  layer: LayerRecipe,
  *,
  key: jax.Array | None = None,
  scales: tuple[Any, Any] = (None, None),
) -> jax.Array:
  """Product [T, O], float32 or wider, with the gradients that the recipe's estimators define.

  Float products run in the narrower of the two operands' types, rotations and scales in float32 or
  wider. w_axis: the axis of w that is summed over. key: for stochastic rounding. scales: the
  learned scales, [1, 1], of (activations, weights)."""
  dtype = min(x_TxK.dtype, w.dtype, key=lambda dtype: dtype.itemsize)
  wide = jnp.promote_types(jnp.promote_types(x_TxK.dtype, w.dtype), jnp.float32)
  x_TxK = rotations.rotate(x_TxK.astype(wide), layer.rotation, 1)
  w = rotations.rotate(w.astype(wide), layer.rotation, w_axis)
  x_scale, w_scale = (scale if scale is None else scale.astype(wide) for scale in scales)
  return _product(layer, w_axis, dtype, x_TxK, w, x_scale, w_scale, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(layer, w_axis, dtype, x_TxK, w, x_scale, w_scale, key):
  return _forward(layer, w_axis, dtype, x_TxK, w, x_scale, w_scale, key)[0]


def _forward(layer, w_axis, dtype, x_TxK, w, x_scale, w_scale, key):
  x_key, w_key, *g_keys = jax.random.split(key, 4) if key is not None else (None,) * 4
  xq, x_saved = _quantize(x_TxK, layer.activations, 1, x_scale, x_key)
  wq, w_saved = _quantize(w, layer.weights, w_axis, w_scale, w_key)
  y_TxO = multiply(xq, wq, 1, w_axis, dtype)
  if layer.backward == "unquantized":
    xq, wq = _plain(x_TxK), _plain(w)
  return y_TxO, (xq, wq, x_saved, w_saved, g_keys)


def _backward(layer, w_axis, dtype, residuals, g_TxO):
  xq, wq, x_saved, w_saved, (x_key, w_key) = residuals
  # Scales along the axis that is now summed over multiply the gradient before it is quantized.
  codes, scale = _factored(wq, w_axis)
  gq, _ = _quantize(g_TxO * scale, layer.gradients, 1, None, x_key)
  dx_TxK = multiply(gq, _plain(codes), 1, 1 - w_axis, dtype)
  codes, scale = _factored(xq, 1)
  gq, _ = _quantize(g_TxO * scale[:, None], layer.gradients, 0, None, w_key)
  factors = (_plain(codes), gq) if w_axis == 0 else (gq, _plain(codes))
  dw = multiply(*factors, 0, 0, dtype)
  return (
    quantizers.backward(x_saved, dx_TxK),
    quantizers.backward(w_saved, dw),
    _scale_gradient(x_saved, dx_TxK, layer.activations, dx_TxK.shape[1]),
    _scale_gradient(w_saved, dw, layer.weights, dw.size),
    None,
  )


_product.defvjp(_forward, _backward)


def _quantize(x, spec: QuantSpec | None, axis: int, scale, key) -> tuple[Quantized, Saved]:
  if spec is None:
    return _plain(x), Saved(None, None)
  scale = quantizers.scale_of(x, spec, axis) if scale is None else scale
  return quantizers.forward(x, scale, spec, key)


def _scale_gradient(saved: Saved, g, spec: QuantSpec | None, count: int) -> jax.Array | None:
  return None if spec is None else quantizers.scale_gradient(saved, g, spec, count)


def _plain(x) -> Quantized:
  wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
  return Quantized(x, jnp.ones((1,) * x.ndim, wide))


def _factored(q: Quantized, axis: int) -> tuple[jax.Array, jax.Array]:
  """(codes, their scales along the other axis), or (values, one) when scales vary along `axis`."""
  if q.scale.shape[axis] > 1:
    return quantizers.dequantize(q), jnp.ones((1,), q.scale.dtype)
  return q.codes, q.scale.reshape(-1)


def multiply(a: Quantized, b: Quantized, a_axis: int, b_axis: int, dtype: Any) -> jax.Array:
  """Matrix product summed over these axes: of int8 codes in int32, otherwise in `dtype`."""
  (a_codes, a_scale), (b_codes, b_scale) = _factored(a, a_axis), _factored(b, b_axis)
  integer = a_codes.dtype == b_codes.dtype == jnp.int8
  y = dot_codes(a_codes, b_codes, a_axis, b_axis, jnp.int8 if integer else dtype)
  return y.astype(jnp.promote_types(a_scale.dtype, b_scale.dtype)) * a_scale[:, None] * b_scale
