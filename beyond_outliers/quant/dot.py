"""The quantized product that a model's linear layers call instead of lax.dot_general."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from beyond_outliers.config.checks import require
from beyond_outliers.ops.outline import outlined_call
from beyond_outliers.params import LOG_SCALE
from beyond_outliers.quant import metrics, qmatrix, quantizers, rotations
from beyond_outliers.quant.backends import aqt as aqt_backend
from beyond_outliers.quant.backends import jax as jax_backend
from beyond_outliers.quant.recipes import Recipe, check_recipe
from beyond_outliers.quant.spec import LayerRecipe

BACKENDS: dict[str, Callable[..., jax.Array]] = {
  "aqt": aqt_backend.dot_general,
  "jax": jax_backend.dot_general,
}


class QuantizedDot(nn.Module):
  """A linear layer's product under a recipe, called in place of lax.dot_general. Its only
  parameters are learned scales, if there are any.

  Stochastic rounding draws from the random stream `rounding`; without one, as in evaluation, values
  round to nearest. If the collection `statistics` is mutable, sums over the activations
  (metrics.Sums) are sown into it."""

  recipe: LayerRecipe
  backend: str

  @nn.compact
  def __call__(self, lhs, rhs, dimension_numbers):
    """[T, O], float32 or wider. lhs: [T, K]. rhs: [K, O] or [O, K], perhaps of a wider type than
    lhs, or a QuantizedMatrix."""
    (lhs_axes, (w_axis,)), batch = dimension_numbers
    if isinstance(rhs, qmatrix.QuantizedMatrix):
      learned = self.recipe.activations is not None and self.recipe.activations.scale == "learned"
      scale = None
      if learned:
        log_scale: Any = self.get_variable("params", LOG_SCALE)
        scale = jnp.exp(log_scale[0]).reshape(1, 1)  # the activations' scale comes first
      return qmatrix.matmul(lhs, rhs, self.recipe, scale)
    if lhs.ndim != 2 or rhs.ndim != 2 or tuple(lhs_axes) != (1,) or any(map(len, batch)):
      raise ValueError(
        f"dimension_numbers = {dimension_numbers} of {lhs.shape} and {rhs.shape}: expected two "
        "matrices, summed over the last axis of the first: reshape the inputs to [tokens, features]"
      )
    options: dict[str, Any] = {}
    if self._has("rounding", "stochastic"):
      options["key"] = self.make_rng("rounding") if self.has_rng("rounding") else None
    scales = self._scales(lhs, rhs, w_axis) if self._has("scale", "learned") else None
    watched = self.is_mutable_collection("statistics") and not self.is_initializing()
    if watched and self.recipe.activations is not None:
      scale = scales[0] if scales else None
      sums, _ = metrics.operand_sums(lhs, self.recipe.activations, 1, scale)
      self.sow("statistics", "activations", sums)
    return _product(BACKENDS[self.backend], w_axis, self.recipe, lhs, rhs, scales, options)

  def _has(self, field, value):
    specs = (self.recipe.weights, self.recipe.activations, self.recipe.gradients)
    return any(spec is not None and getattr(spec, field) == value for spec in specs)

  def _scales(self, lhs, rhs, w_axis):
    """Learned scales of (activations, weights), [1, 1] each, or None.

    The first forward pass initializes them.

    Their logarithms are learned. The steps of the optimizers here have the same length however long
    the gradient is: they would push scales of about 0.01 below zero, but they change logarithms in
    proportion (as arXiv 1903.08066 argues)."""
    operands = {
      "activations": (self.recipe.activations, lhs, 1),
      "weights": (self.recipe.weights, rhs, w_axis),
    }
    learned = {
      name: (spec, x, axis)
      for name, (spec, x, axis) in operands.items()
      if spec and spec.scale == "learned"
    }

    def begin(key):
      del key
      scales = []
      for spec, x, axis in learned.values():
        x = rotations.rotate(x.astype(jnp.float32), spec.rotation, axis)
        scales.append(quantizers.scale_of(x, spec, axis).reshape(()))
      return jnp.log(jnp.maximum(jnp.stack(scales), 1e-8))  # of all-zero inputs the scale is 0

    log_scale: Any = self.param(LOG_SCALE, nn.with_logical_partitioning(begin, ("vector",)))
    each = dict(zip(learned, jnp.exp(log_scale).reshape(-1, 1, 1), strict=True))
    return each.get("activations"), each.get("weights")


def _multiply(backend, w_axis, layer, x_TxK, w, scales, options):
  if scales is not None:
    options = {**options, "scales": scales}
  return backend(x_TxK, w, w_axis, layer, **options)


def _forward(backend, w_axis, layer, x_TxK, w, scales, options):
  """(y, its pullback: a tree that holds codes, their scales and masks)."""

  def with_pullback(x_TxK, w, scales, options):
    def product(x_TxK, w, scales):
      return _multiply(backend, w_axis, layer, x_TxK, w, scales, options)

    return jax.vjp(product, x_TxK, w, scales)

  return outlined_call(with_pullback, x_TxK, w, scales, options)


def _backward(backend, w_axis, layer, pullback, g_TxO):
  """Gradients of (x, w, scales, options). A learned scale's is computed with its operand's."""
  del backend, w_axis, layer

  def of_operand(index, pullback, g_TxO):
    *operands, scales = pullback(g_TxO)
    return operands[index], None if scales is None else scales[index]

  (x_bar, x_scale_bar), (w_bar, w_scale_bar) = (
    outlined_call(functools.partial(of_operand, index), pullback, g_TxO) for index in range(2)
  )
  learned = x_scale_bar is not None or w_scale_bar is not None
  return x_bar, w_bar, (x_scale_bar, w_scale_bar) if learned else None, None


# The forward pass and each gradient are separate calls: otherwise XLA:CPU stores rotated values
# instead of codes and masks, and computes both gradients at once, each from its own scaled copy of
# y's gradient.
_product = jax.custom_vjp(_multiply, nondiff_argnums=(0, 1, 2))
_product.defvjp(_forward, _backward)


def dot_general_for(
  recipe: Recipe, backend: str = "aqt"
) -> Callable[[str], Callable[[], QuantizedDot] | None]:
  """The model's `dot_general_for`: path of a linear layer -> factory of its dot_general, or None
  for the plain product.

  Layers of equal recipes get the same object. What AQT cannot express (backends/aqt.py) runs in
  plain JAX, with a warning in the log.
  Errors: ConfigError for an unknown backend or something that is no Recipe, and later for a path
  that no rule matches."""
  check_recipe(recipe)
  require(
    backend in BACKENDS,
    "quant.backend",
    backend,
    "expected one of " + ", ".join(map(repr, BACKENDS)),
  )

  def dot_general_of(path):
    layer = recipe.layer(path)
    return None if layer is None else _maker(layer, backend)

  return dot_general_of


def trained_under(model: Any, path: str) -> Any:
  """What governs a model's product in a linear layer: its LayerRecipe, None for the plain product,
  or the factory of a dot_general that this module did not make."""
  maker = model.dot_general_for and model.dot_general_for(path)
  ours = isinstance(maker, functools.partial) and maker.func is QuantizedDot
  return maker.args[0] if ours else maker


@functools.cache
def _maker(layer: LayerRecipe, backend: str) -> Callable[[], QuantizedDot]:
  if backend == "aqt" and not aqt_backend.expresses(layer):
    logging.warning("AQT cannot express %s: plain JAX multiplies instead", layer)
    backend = "jax"
  return functools.partial(QuantizedDot, layer, backend)
