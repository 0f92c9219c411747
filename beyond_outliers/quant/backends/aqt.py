"""The product of a linear layer with quantized operands by AQT. No other module imports AQT.

AQT does the plumbing: it calibrates, quantizes, multiplies, scales, and multiplies again in the
backward pass. Each part of a spec is computed by

  scales                                   `Scaling` below, by our rules
  symmetric, absmax or absmax_edge,        AQT's IntSymmetric
    ste, nearest
  e4m3 or e5m2, absmax, ste, nearest       AQT's Fp8Numerics
  any other grid, scale rule,              `Rounding` below, by our quantizers
    estimator or rounding
  granularities group, mx, nv, nv_token    nothing: AQT's scales are constant along the contraction
  learned scales                           nothing: AQT's backward pass has no gradient for them
  twos_complement, absmax_edge             nothing: AQT multiplies by reciprocals, which round
                                           twice, but the last bit of halfway numbers matters

Upstream names Qwix as AQT's successor; a module like this one for Qwix would be another row of
dot.BACKENDS.
Legend: T tokens, K contraction, O outputs; w is [K, O], or [O, K] with w_axis 1.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, calibration, utils
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.numerics import fp8_numerics, int_numerics, no_numerics, numerics

from beyond_outliers.ops.int_dot import dot_codes
from beyond_outliers.quant import quantizers, rotations
from beyond_outliers.quant.grids import Float
from beyond_outliers.quant.scales import GRANULARITIES, SCALES
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec

# AQT turns these into dataclasses by a decorator that type checkers cannot follow.
IntSymmetric: Any = int_numerics.IntSymmetric
Fp8Numerics: Any = fp8_numerics.Fp8Numerics
Numerics: Any = numerics.AqtNumerics
Calibration: Any = calibration.Calibration


def expresses(layer: LayerRecipe) -> bool:
  """Whether AQT can multiply under this recipe; see the table above."""
  specs = (layer.weights, layer.activations, layer.gradients)
  return all(
    spec is None
    or not (
      GRANULARITIES[spec.granularity].block is not None
      or spec.scale == "learned"
      or quantizers.divides(spec)
    )
    for spec in specs
  )


def dot_general(
  x_TxK: jax.Array, w: jax.Array, w_axis: int, layer: LayerRecipe, *, key: jax.Array | None = None
) -> jax.Array:
  """Product [T, O], float32, by AQT: as jax_backend.dot_general, if AQT `expresses` the recipe."""
  dtype = min(x_TxK.dtype, w.dtype, key=lambda dtype: dtype.itemsize)
  # AQT's scales have their operand's type, so operands are passed in float32; codes are narrowed.
  x_TxK = rotations.rotate(x_TxK.astype(jnp.float32), layer.rotation, 1)
  w = rotations.rotate(w.astype(jnp.float32), layer.rotation, w_axis)
  configured = aqt_config.set_context(_config(layer, dtype, w_axis), key, train_step=None)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*requested in astype is not available.*")
    return configured(x_TxK, w, (((1,), (w_axis,)), ((), ())))


@functools.cache
def _config(layer: LayerRecipe, dtype: Any, w_axis: int) -> aqt_dot_general.DotGeneral:
  c = aqt_dot_general.DotGeneral.make(8, 8, use_fwd_quant=False)
  _set(c.fwd, layer.activations, layer.weights)
  _set(c.dlhs, layer.gradients, None)
  _set(c.drhs, layer.gradients, None)
  quantized = layer.backward == "quantized"
  aqt_config.set_use_fwd_quant(
    c, quantized and layer.weights is not None, quantized and layer.activations is not None
  )
  # AQT passes the forward pass's codes to backward products as floats.
  gradients = _is_int8(layer.gradients) and quantized
  c.fwd.dot_general = _Product(dtype, _is_int8(layer.activations) and _is_int8(layer.weights))
  c.dlhs.dot_general = _Product(dtype, gradients and _is_int8(layer.weights))
  # For weights [K, O] AQT computes gᵀ x and transposes it. XLA would fold a transpose that directly
  # follows a product into it, but not one that follows the scales.
  swapped = w_axis == 0 and layer.gradients is None
  c.drhs.dot_general = _Product(dtype, gradients and _is_int8(layer.activations), swapped)
  return c


def _is_int8(spec: QuantSpec | None) -> bool:
  return spec is not None and spec.levels.dtype == jnp.int8


@dataclasses.dataclass(frozen=True)
class _Product:
  """What AQT calls as lax.dot_general: multiplies in int8, or in `dtype`; returns float32.

  swapped: compute the transpose of the swapped product, because AQT transposes the result."""

  dtype: Any
  integer: bool
  swapped: bool = False

  def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    del precision, preferred_element_type
    ((lhs_axis,), (rhs_axis,)), _ = dimension_numbers
    dtype = jnp.int8 if self.integer else self.dtype
    if self.swapped:
      y = dot_codes(rhs, lhs, rhs_axis, lhs_axis, dtype).T
    else:
      y = dot_codes(lhs, rhs, lhs_axis, rhs_axis, dtype)
    return y.astype(jnp.float32)


def _set(raw: Any, lhs: QuantSpec | None, rhs: QuantSpec | None) -> None:
  aqt_config.set_numerics(raw, _numerics(lhs), _numerics(rhs))
  for quantizer, spec in ((raw.dg_quantizer.lhs, lhs), (raw.dg_quantizer.rhs, rhs)):
    if spec is not None:
      _calibrate(quantizer, spec)


def _calibrate(quantizer: Any, spec: QuantSpec) -> None:
  quantizer.calibration = functools.partial(Scaling, spec=spec)
  if GRANULARITIES[spec.granularity].all:
    quantizer.calib_shared_axes = "per_tensor"


def _numerics(spec: QuantSpec | None) -> Any:
  if spec is None:
    return no_numerics.NoNumerics()
  by_absmax = spec.scale in ("absmax", "absmax_edge")
  plain = by_absmax and spec.estimator == "ste" and spec.rounding == "nearest"
  if spec.grid == "symmetric" and plain:
    return IntSymmetric(
      bits=int(spec.bits),
      preserve_zero=True,
      preserve_max_val=spec.scale == "absmax",
      clip=True,
      round=True,
      clip_gradient=False,
      noise_fn=None,
      dtype=jnp.int8,
    )
  if isinstance(spec.levels, Float) and spec.bits == 8 and plain:
    mantissa = spec.levels.mantissa_bits
    return Fp8Numerics(
      dtype=spec.levels.dtype.type, exponent_bits=7 - mantissa, mantissa_bits=mantissa
    )
  return Rounding(spec=spec)


@utils.flax_slots_kw_only_dataclass
class Rounding(Numerics):
  """Our grids and estimators as AQT numerics: the backward pass applies the forward pass's mask."""

  spec: QuantSpec

  def get_dtype(self):
    return self.spec.levels.dtype

  def get_quant_bound(self):
    return self.spec.levels.largest

  def vjp_fwd(self, x, context):
    return quantizers.encode(x, self.spec, context.key)

  def vjp_bwd(self, res, grad):
    return quantizers.backward(res, grad), None


@utils.flax_slots_kw_only_dataclass
class Scaling(Calibration):
  """Our scale rules as an AQT calibration."""

  spec: QuantSpec

  def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
    return [SCALES[self.spec.scale](x, tuple(shared_axes or ()), self.spec.levels)], [], None
