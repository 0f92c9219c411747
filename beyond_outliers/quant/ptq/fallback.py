"""Fallbacks for matrices on which a method exceeds float32: more damping, then plain rounding.

GPTQ factors the damped Gram matrix of a layer's inputs. With few tokens, or correlated inputs, its
smallest eigenvalues are almost zero, and a Cholesky factor exists only with damping above about
1e-6 of the mean square: damping grows tenfold until it does. Smoothing factors, and the search for
them, may leave float32's range too. If all else fails, a matrix is rounded to nearest, unsmoothed.

Legend: K contraction, O outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.config.checks import require
from beyond_outliers.ops.extremes import max_magnitude, min_or_nan
from beyond_outliers.quant import qmatrix
from beyond_outliers.quant.ptq.calibration import Inputs
from beyond_outliers.quant.ptq.methods import Method
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.spec import LayerRecipe

# The most damping that is tried, relative to the inputs' mean square: every Gram matrix has a
# Cholesky factor then.
MOST_DAMPING = 1.0


class Fallback(NamedTuple):
  """How one matrix was quantized instead of by the method."""

  matrix: str  # path of its linear layer: layers/3/mlp/up
  rounding: str  # row of ROUNDERS; "nearest" also means that it is not smoothed
  damping: float | None = None  # of that rounding, if it is GPTQ's

  def __str__(self) -> str:
    damping = "" if self.damping is None else f" with damping {self.damping:g}"
    return f"{self.matrix}: {self.rounding}{damping}"


def usable(weight: QuantizedMatrix, layer: LayerRecipe) -> jax.Array:
  """Whether codes times scales are finite, and the smoothing factors finite normal numbers."""
  assert layer.weights is not None  # the caller saw to it
  grid = layer.weights.levels
  ok = jnp.isfinite(max_magnitude(weight.scale) * max(-grid.lowest, grid.largest))
  if weight.smooth is not None:
    least, most = min_or_nan(weight.smooth), max_magnitude(weight.smooth)
    ok &= (least >= jnp.finfo(least.dtype).tiny) & jnp.isfinite(most)
  return ok


def fall_back(
  attempt: Callable[..., tuple[QuantizedMatrix, jax.Array]],
  how: Method,
  path: str,
  kernel_KxO: jax.Array,
  layer: LayerRecipe,
  inputs: Inputs | None,
) -> tuple[QuantizedMatrix, Fallback]:
  """The quantized matrix at `path`, where `how` gave no usable one.

  By `how` with the least damping that gives a usable matrix with no larger output error on the
  calibration inputs than rounding to nearest has; else rounded to nearest.
  attempt: (method, damping instead of its own) -> (matrix, whether it is usable).
  Errors: ConfigError for numbers that cannot be rounded either."""
  nearest, ok = attempt(dataclasses.replace(how, rounding="nearest", smoothing=""))
  require(
    bool(ok),
    f"params: {path}",
    float(max_magnitude(kernel_KxO)),
    "a number so large that its scale overflows; check the checkpoint, or use another scale",
  )
  if "damping" in how.options and inputs is not None:
    error = functools.partial(_output_error, kernel_KxO, inputs.gram_KxK, layer)
    damping = 10 * how.damping
    while damping <= MOST_DAMPING * (1 + 1e-6):
      matrix, ok = attempt(how, damping)
      if ok and error(matrix) <= error(nearest):
        return matrix, Fallback(path, how.rounding, damping)
      damping *= 10
  return nearest, Fallback(path, "nearest")


@functools.partial(jax.jit, static_argnums=2)
def _output_error(kernel_KxO, gram_KxK, layer: LayerRecipe, weight: QuantizedMatrix) -> jax.Array:
  """Mean squared norm of the change that quantized weights make to the layer's output."""
  error_KxO = qmatrix.reconstruct(weight, layer) - kernel_KxO
  return jnp.sum(error_KxO * jnp.matmul(gram_KxK, error_KxO, precision=lax.Precision.HIGHEST))
