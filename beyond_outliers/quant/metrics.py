"""Metrics of the quantized operands of a model's linear layers, logged during training.

For each kind of layer (`attention/q`, ..., `mlp/down`, `head`), all depths pooled, and for both
operands X, weights and activations:

  quant/X/sqnr/<kind>           dB: 10 log10 of Σ x² / Σ (x̂ - x)²
  quant/X/masked/<kind>         share of elements whose gradient the estimator drops; 0 for ste
  quant/X/clipped/<kind>        share of elements above the largest or below the lowest level
  quant/weights/crossed/<kind>  share of weights whose code changed in this step
  quant/weights/crossed         the same, over all quantized weights

A code changes when its weight crosses a boundary between two levels, or when the boundary crosses
the weight, since scales move with the weights. Values are those that the dot product quantizes:
rotated, under the scales of the step; but always rounded to nearest, also where training rounds
stochastically.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.quant import quantizers, rotations
from beyond_outliers.quant.estimators import within_levels
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.quant.spec import QuantSpec


class LinearsOfKind(Protocol):
  """All linear layers of one kind: see model.linears.Linears."""

  @property
  def paths(self) -> tuple[str, ...]: ...
  @property
  def kernels(self) -> Any: ...
  @property
  def axis(self) -> int: ...
  @property
  def own(self) -> Any: ...


class Sums(NamedTuple):
  """Sums over an operand's elements: scalars, or arrays by depth, NaN where a depth has none."""

  signal: jax.Array  # Σ x²
  error: jax.Array  # Σ (x̂ - x)²
  masked: jax.Array  # number of elements, as the next two
  clipped: jax.Array
  count: jax.Array


def operand_sums(
  x: jax.Array, spec: QuantSpec, axis: int, scale: jax.Array | None = None
) -> tuple[Sums, jax.Array]:
  """(sums over x, its codes). axis: the product's contraction axis. scale: a learned one."""
  x = rotations.rotate(x.astype(jnp.promote_types(x.dtype, jnp.float32)), spec.rotation, axis)
  scale = quantizers.scale_of(x, spec, axis) if scale is None else scale.astype(x.dtype)
  v, grid = quantizers.in_units(x, scale, spec), spec.levels
  codes, saved = quantizers.encode(v, spec, None)
  error = quantizers.dequantize(quantizers.Quantized(codes, scale)) - x
  clipped = ~within_levels(v, grid)
  masked = 0 if saved.passes is None else _count(~saved.passes)
  numbers = (jnp.sum(x * x), jnp.sum(error * error), masked, _count(clipped), x.size)
  return Sums(*(jnp.asarray(number, jnp.float32) for number in numbers)), codes


def of_activations(sown: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Metrics of activations, by kind of layer, from what dot.QuantizedDot sowed."""
  metrics: dict[str, jax.Array] = {}
  for kind, collection in sown.items():
    (sums,) = collection["activations"]
    present = Sums(*(jnp.where(jnp.isnan(sums.count), 0, x) for x in sums))
    metrics |= _metrics("activations", kind, present)
  return metrics


def of_weights(
  recipe: Recipe, linears: Mapping[str, LinearsOfKind], before: Mapping[str, LinearsOfKind]
) -> dict[str, jax.Array]:
  """Metrics of weights after and before a step, by kind. Sharded kernels stay where they are."""
  metrics: dict[str, jax.Array] = {}
  crossed, count = [], []
  for kind, layers in linears.items():
    depths: dict[QuantSpec, list[int]] = {}
    for depth, layer in enumerate(map(recipe.layer, layers.paths)):
      if layer is not None and layer.weights is not None:
        depths.setdefault(layer.weights, []).append(depth)
    found = [_of_step(spec, of_spec, layers, before[kind]) for spec, of_spec in depths.items()]
    if found:
      sums, crossings = jax.tree.map(lambda *depths: jnp.concatenate(depths), *found)
      metrics |= _metrics("weights", kind, sums)
      metrics[f"quant/weights/crossed/{kind}"] = jnp.sum(crossings) / jnp.sum(sums.count)
      crossed.append(jnp.sum(crossings))
      count.append(jnp.sum(sums.count))
  if crossed:
    metrics["quant/weights/crossed"] = jnp.sum(jnp.stack(crossed)) / jnp.sum(jnp.stack(count))
  return metrics


def _of_step(
  spec: QuantSpec, depths: list[int], after: LinearsOfKind, before: LinearsOfKind
) -> tuple[Sums, jax.Array]:
  """By depth: sums over the kernels of these depths, and how many of their codes changed."""

  def of_depth(kernels_and_scales):
    (kernel, scale), (old_kernel, old_scale) = kernels_and_scales
    sums, codes = operand_sums(kernel, spec, after.axis, scale)
    _, old = operand_sums(old_kernel, spec, after.axis, old_scale)
    return sums, _count(codes.astype(jnp.float32) != old.astype(jnp.float32)).astype(jnp.float32)

  def operands(layers):
    # The last of the learned scales is the weights'.
    scales = (
      jnp.exp(layers.own["log_scale"][:, -1]).reshape(-1, 1, 1) if spec.scale == "learned" else None
    )
    every = len(depths) == len(layers.paths)
    return jax.tree.map(lambda x: x if every else x[np.array(depths)], (layers.kernels, scales))

  # One depth after another, so that only one depth's temporaries are in memory.
  return jax.lax.map(of_depth, (operands(after), operands(before)))


def _count(where: jax.Array) -> jax.Array:
  return jnp.sum(where, dtype=jnp.int32)


def _metrics(operand: str, kind: str, sums: Sums) -> dict[str, jax.Array]:
  signal, error, masked, clipped, count = map(jnp.sum, sums)
  shares = {
    "sqnr": 10 * jnp.log10(signal / error),
    "masked": masked / count,
    "clipped": clipped / count,
  }
  return {f"quant/{operand}/{name}/{kind}": value for name, value in shares.items()}
