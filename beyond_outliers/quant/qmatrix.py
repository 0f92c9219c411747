"""Quantized matrices, which replace arrays in a model's parameters, and the product with them.

Legend: T tokens, K contraction, O outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beyond_outliers.quant import quantizers, rotations
from beyond_outliers.quant.backends import jax as jax_backend
from beyond_outliers.quant.quantizers import Quantized
from beyond_outliers.quant.spec import LayerRecipe


class QuantizedMatrix(NamedTuple):
  """The matrix [K, O] of a linear layer as codes · scale, in the basis that its recipe rotates to.

  Of stacked layers, every field has the depth as its first axis. `codes` is the first field: flax
  compares its shape with the array's.
  smooth: factors that multiply the input, and divide the matrix, before the rotation."""

  codes: jax.Array  # [K, O], in the type of the grid's codes
  scale: jax.Array  # [1 or groups, O], or [1, 1]
  smooth: jax.Array | None = None  # [K]


def in_quantized_basis(
  w_KxO: jax.Array, layer: LayerRecipe, smooth_K: jax.Array | None = None
) -> jax.Array:
  """The matrix of a layer, smoothed and rotated; float32 or wider."""
  w_KxO = w_KxO.astype(jnp.promote_types(w_KxO.dtype, jnp.float32))
  w_KxO = w_KxO if smooth_K is None else w_KxO / smooth_K[:, None]
  return rotations.rotate(w_KxO, layer.rotation, 0)


def gram_in_quantized_basis(
  gram_KxK: jax.Array, layer: LayerRecipe, smooth_K: jax.Array | None = None
) -> jax.Array:
  """The Gram matrix of a layer's inputs, in the basis of `in_quantized_basis`."""
  gram_KxK = gram_KxK if smooth_K is None else gram_KxK * smooth_K * smooth_K[:, None]
  return rotations.rotate(rotations.rotate(gram_KxK, layer.rotation, 0), layer.rotation, 1)


def matmul(
  x_TxK: jax.Array, weight: QuantizedMatrix, layer: LayerRecipe | None, scale: Any = None
) -> jax.Array:
  """The product of a layer's input and its quantized matrix: [T, O], float32 or wider.

  The same bits as `jax_backend.dot_general` with the unquantized matrix, if that was rounded to
  nearest and its whole stack is quantized alike.
  layer None: the input is used as it is. scale: the activations' learned scale, if any."""
  wide = jnp.promote_types(x_TxK.dtype, jnp.float32)
  x = x_TxK.astype(wide) if weight.smooth is None else x_TxK.astype(wide) * weight.smooth
  x = x if layer is None else rotations.rotate(x, layer.rotation, 1)
  if layer is None or layer.activations is None:
    xq = Quantized(x, jnp.ones((1, 1), wide))
  else:
    scale = quantizers.scale_of(x, layer.activations, 1) if scale is None else scale.astype(wide)
    xq, _ = quantizers.forward(x, scale, layer.activations)
  return jax_backend.multiply(xq, Quantized(weight.codes, weight.scale), 1, 0, x_TxK.dtype)


def plain_product() -> Any:
  """The dot_general of an unquantized layer whose stack also has quantized ones."""
  return lambda lhs, rhs, dimension_numbers: matmul(lhs, rhs, None)


def reconstruct(weight: QuantizedMatrix, layer: LayerRecipe) -> jax.Array:
  """The matrix [K, O] that the layer effectively multiplies by, in the basis of its input."""
  w_KxO = quantizers.dequantize(Quantized(weight.codes, weight.scale))
  w_KxO = rotations.unrotate(w_KxO, layer.rotation, 0)
  return w_KxO if weight.smooth is None else w_KxO * weight.smooth[:, None]
