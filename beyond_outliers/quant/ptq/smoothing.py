"""Smoothing: factors that scale a layer's inputs and are undone in its matrix. The layer's function
is unchanged, but outliers move from one to the other.

Legend: K contraction, O outputs; a factor [K] multiplies the input, and its reciprocal the matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops.extremes import max_magnitude, min_or_nan
from beyond_outliers.quant import qmatrix, quantizers, rotations
from beyond_outliers.quant.ptq.calibration import Inputs
from beyond_outliers.quant.spec import LayerRecipe

ALPHA = 0.5  # SmoothQuant's: the official default
AWQ_STEPS = 20  # number of exponents tried, evenly spaced in [0, 1)


def smoothquant(
  w_KxO: jax.Array, inputs: Inputs, layer: LayerRecipe, alpha: float = ALPHA
) -> jax.Array:
  """SmoothQuant's factor for each input: max |w|^(1 - α) / max |x|^α (arXiv 2211.10438, eq. 4).

  Each layer has its own factors. In the paper, which fuses them into the norm before, all layers
  that follow a norm share them."""
  del layer
  x_K, w_K = jnp.maximum(inputs.largest_K, 1e-5), jnp.maximum(max_magnitude(w_KxO, 1), 1e-5)
  return w_K ** (1 - alpha) / x_K**alpha


def awq(w_KxO: jax.Array, inputs: Inputs, layer: LayerRecipe, alpha: float = ALPHA) -> jax.Array:
  """AWQ's factor for each input, proportional to (mean |x|)^-α (arXiv 2306.00978, equations 4, 5).

  α in [0, 1) is the one that changes the layer's output least when its weights are rounded to
  nearest, by the inputs' Gram matrix. The paper's search for a clip is left out. NaN if no change
  of the output is finite."""
  del alpha
  w_KxO, x_K = w_KxO.astype(inputs.mean_K.dtype), jnp.maximum(inputs.mean_K, 1e-4)

  def factors(alpha):
    s_K = jnp.maximum(x_K**alpha, 1e-4)
    return jnp.sqrt(max_magnitude(s_K) * min_or_nan(s_K)) / s_K

  def attempt(best, alpha):
    smooth_K = factors(alpha)
    error = output_error(w_KxO, smooth_K, inputs, layer)
    better = error < best[0]
    return jax.tree.map(functools.partial(jnp.where, better), (error, smooth_K), best), None

  start = jnp.full((), jnp.inf, x_K.dtype), jnp.ones_like(x_K)
  least, smooth_K = lax.scan(attempt, start, jnp.arange(AWQ_STEPS, dtype=x_K.dtype) / AWQ_STEPS)[0]
  return jnp.where(jnp.isfinite(least), smooth_K, jnp.nan)


def output_error(
  w_KxO: jax.Array, smooth_K: jax.Array, inputs: Inputs, layer: LayerRecipe
) -> jax.Array:
  """Mean squared norm of the change in a layer's output when its weights are rounded to nearest and
  its inputs stay as they are."""
  w = qmatrix.in_quantized_basis(w_KxO, layer, smooth_K)
  spec: Any = layer.weights
  codes = quantizers.forward(w, quantizers.scale_of(w, spec, 0), spec)[0]
  error_KxO = rotations.unrotate(quantizers.dequantize(codes) - w, layer.rotation, 0)
  error_KxO = error_KxO * smooth_K[:, None]
  of_gram_KxO = jnp.matmul(inputs.gram_KxK, error_KxO, precision=lax.Precision.HIGHEST)
  return jnp.sum(error_KxO * of_gram_KxO)


class Smoothing(NamedTuple):
  """A rule for a layer's factors, and what it needs.

  factors: (w [K, O], inputs, layer, alpha) -> [K].
  needs_gram: whether it reads the inputs' Gram matrix.
  options: the fields of Method that it reads; a method's name may set them."""

  factors: Callable[[jax.Array, Inputs, LayerRecipe, float], jax.Array]
  needs_gram: bool = False
  options: tuple[str, ...] = ()


SMOOTHINGS: dict[str, Smoothing] = {
  "smoothquant": Smoothing(smoothquant, options=("alpha",)),
  "awq": Smoothing(awq, needs_gram=True),
}
