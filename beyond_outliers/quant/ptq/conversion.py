"""`quantize`: post-training quantization (PTQ), block by block.

Turns a trained model into a quantized one with the same interface.

A method is a row of METHODS (methods.py). Matrices become codes block after block, using statistics
of their inputs over all calibration batches (calibration.py).

A tied head is quantized in every forward pass, since the embedding needs its matrix unquantized; it
is rounded to nearest, whatever the method.
Legend: N depths, K contraction, O outputs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from beyond_outliers.config.checks import require
from beyond_outliers.params import (
  KERNEL,
  LAYERS,
  LOG_SCALE,
  depth_of,
  kernel_path,
  kind_of,
  layer_path,
  leaves_by_path,
  slice_at,
  stack_path,
  subtree,
  with_leaves,
)
from beyond_outliers.quant import qmatrix, quantizers
from beyond_outliers.quant.dot import dot_general_for
from beyond_outliers.quant.ptq import calibration, rotation_fusion
from beyond_outliers.quant.ptq.calibration import Inputs, Stage
from beyond_outliers.quant.ptq.checks import (
  check_batches,
  check_inputs,
  check_model,
  check_parameters,
)
from beyond_outliers.quant.ptq.fallback import Fallback, fall_back, usable
from beyond_outliers.quant.ptq.gptq import ROUNDERS
from beyond_outliers.quant.ptq.methods import Method, method_named
from beyond_outliers.quant.ptq.model import QuantizedModel, serving
from beyond_outliers.quant.ptq.smoothing import SMOOTHINGS
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import LinearShape, Recipe, check_recipe
from beyond_outliers.quant.spec import LayerRecipe
from beyond_outliers.types import LanguageModel, Params

Matrices = dict[str, QuantizedMatrix]  # of a block, by kind of linear layer


def quantize(
  model: LanguageModel,
  params: Params,
  recipe: Recipe,
  method: str = "rtn",
  calibration_batches: Iterable[calibration.Batch] = (),
  *,
  say: Callable[[str], None] = lambda text: None,
) -> QuantizedModel:
  """Post-training quantization of a model by `recipe` and `method`, with calibration.

  Quantizes what the recipe says: matrices of linear layers, and their inputs.

  model, params: a transformer and its parameters, as trained. calibration_batches: {"tokens": [B,
  L]; also "segment_ids" and "positions" if documents are kept separate}, for methods that need
  them; without padding, since every token counts. say: called with a line of progress per block,
  and one per matrix that `method` could not quantize (fallback.py).
  Errors: ConfigError for an unknown method, a model that was trained under another quantization,
  parameters that are another model's, already quantized or not finite, batches that are missing or
  another tokenizer's, inputs that are not finite, a recipe that does not fit the model, or learned
  scales that the parameters lack."""
  check_recipe(recipe)
  how = method_named(method)
  batches = list(calibration_batches) if how.calibrated else []
  if how.calibrated:
    check_batches(batches, method, model.config.vocab)
  check_parameters(params)
  model, params, recipe = _prepared(model, jax.tree.map(jnp.asarray, params), recipe, how)
  stream = calibration.Stream(model.clone(dot_general_for=None), params, batches)
  blocks: list[Matrices] = []
  fallbacks: list[Fallback] = []

  def quantize_matrix(
    path: str, linear: Params, layer: LayerRecipe, inputs: Inputs | None
  ) -> QuantizedMatrix:
    matrix, fallback = _quantized_matrix(path, linear, layer, how, inputs)
    if fallback is not None:
      fallbacks.append(fallback)
      say(f"{method} is out of float32's reach for {fallback}")
    return matrix

  for matrices in _quantized_blocks(model, params, recipe, how, stream, quantize_matrix):
    blocks.append(matrices)
    say(f"{method}: block {len(blocks)} of {model.config.blocks}")
  params = {**params, LAYERS: _with_stacks(params[LAYERS], blocks, recipe)}
  head = recipe.layer("head")
  if "head" in params and head is not None and head.weights is not None:
    inputs = stream.see_head(gram=how.needs_gram) if how.calibrated else None
    if inputs is not None:
      check_inputs("head", inputs)
    params = _with_kernels(params, {"head": quantize_matrix("head", params["head"], head, inputs)})
  return QuantizedModel(serving(model, params, recipe), params, recipe, method, tuple(fallbacks))


def check_quantizable(
  model: LanguageModel, params: Params, recipe: Recipe, method: str = "rtn", field: str = "method"
) -> None:
  """Refuses what `quantize` cannot take, before there are values. params: arrays or their shapes.

  Errors: ConfigError, as for `quantize`."""
  how = method_named(method, field)
  jax.eval_shape(lambda params: _prepared(model, params, recipe, how)[1], params)


def quantized(model: LanguageModel, params: Params, recipe: Recipe) -> QuantizedModel:
  """A model trained under `recipe`, its matrices replaced by the codes that it multiplied by."""
  return quantize(model, params, recipe)


# ---- before the pass over the blocks: checks, and fused rotations


def _prepared(
  model: LanguageModel, params: Params, recipe: Recipe, how: Method
) -> tuple[LanguageModel, Params, Recipe]:
  """Model and parameters with fused rotations, and the recipe as the method changes it.

  Errors: ConfigError for whatever does not fit together."""
  require(
    not any(isinstance(leaf, QuantizedMatrix) for leaf in leaves_by_path(params).values()),
    "params",
    "quantized",
    "they are quantized already; start from those of a trained model",
  )
  check_model(model, params, recipe, how)
  if how.fused:
    model, params, rotated = rotation_fusion.fuse(model, params)
    # One rule per path, since inputs that are already rotated must not be rotated again.
    rules = tuple(
      (re.escape(path), how.layer(recipe.layer(path), rotated=kind_of(path) in rotated))
      for path in model.contractions()
    )
  else:
    rules = tuple((paths, how.layer(layer)) for paths, layer in recipe.rules)
  recipe = Recipe(rules)
  recipe.check({path: LinearShape(width) for path, (width, _) in model.contractions().items()})
  for path in model.contractions():
    _check_learned_scales(path, recipe.layer(path), params)
  return model, params, recipe


def _check_learned_scales(path: str, layer: LayerRecipe | None, params: Params) -> None:
  specs = (layer.weights, layer.activations) if layer else ()
  learns = any(spec is not None and spec.scale == "learned" for spec in specs)
  tied = path == "head" and "head" not in params
  require(
    not learns or tied or _log_scale(subtree(params, stack_path(path))) is not None,
    f"recipe: {path}: scale",
    "learned",
    "the parameters hold no learned scales; only a model that was trained under this recipe has "
    "them",
  )


# ---- the pass over the blocks


def _quantized_blocks(
  model: LanguageModel,
  params: Params,
  recipe: Recipe,
  how: Method,
  stream: calibration.Stream,
  quantize_matrix: Callable[[str, Params, LayerRecipe, Inputs | None], QuantizedMatrix],
) -> Iterator[Matrices]:
  """The quantized matrices of each block in turn; at the end `stream` is past the last block."""
  kinds = [kind_of(path) for path in model.contractions() if depth_of(path) == 0]
  watched = model.clone(dot_general_for=calibration.watched)
  quantized_model = model.clone(dot_general_for=dot_general_for(recipe, "jax"))
  for depth in range(model.config.blocks):
    of_block, inputs = _slice_at(params[LAYERS], depth), {}
    if how.calibrated:
      block = Stage(watched.block(depth), of_block)
      inputs = stream.see(block, gram=how.needs_gram, run=not how.sequential)
      for kind, of_layer in inputs.items():
        check_inputs(layer_path(depth, kind), of_layer)
    layers = {kind: recipe.layer(layer_path(depth, kind)) for kind in kinds}
    matrices = {
      kind: quantize_matrix(
        layer_path(depth, kind), subtree(of_block, kind), layer, inputs.get(kind)
      )
      for kind, layer in layers.items()
      if layer is not None and layer.weights is not None
    }
    if how.sequential:
      stream.run(Stage(quantized_model.block(depth), _with_kernels(of_block, matrices)))
    yield jax.block_until_ready(matrices)


_slice_at = jax.jit(slice_at)


def _with_kernels(tree: Params, kernels: Matrices) -> Params:
  """The tree with the linear layers' matrices at these paths replaced."""
  return with_leaves(tree, {kernel_path(path): weight for path, weight in kernels.items()})


def _log_scale(linear: Params) -> Any:
  """Learned scales of a linear layer, of activations and weights, from its parameters; or None."""
  nodes = (node for node in linear.values() if isinstance(node, dict))
  return next((node[LOG_SCALE] for node in nodes), None)


def _quantized_matrix(
  path: str, linear: Params, layer: LayerRecipe, how: Method, inputs: Inputs | None
) -> tuple[QuantizedMatrix, Fallback | None]:
  """The quantized matrix of one linear layer, and what replaced the method, if anything did.

  linear: the layer's parameters."""
  scale: Any = None
  if layer.weights is not None and layer.weights.scale == "learned":
    scale = jnp.exp(_log_scale(linear))[-1].reshape(1, 1)
  attempt = functools.partial(_rounded, linear[KERNEL], inputs, scale, layer)
  matrix, ok = attempt(how)
  if ok:
    return matrix, None
  return fall_back(attempt, how, path, linear[KERNEL], layer, inputs)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded(
  kernel_KxO, inputs: Any, scale, layer: LayerRecipe, how: Method, damping: Any = None
) -> tuple[QuantizedMatrix, jax.Array]:
  """(the matrix, whether it is usable). damping: replaces the method's; traced."""
  smooth_K = None
  if how.smoothing:
    smooth_K = SMOOTHINGS[how.smoothing].factors(kernel_KxO, inputs, layer, how.alpha)
  w_KxO, spec = qmatrix.in_quantized_basis(kernel_KxO, layer, smooth_K), layer.weights
  assert spec is not None  # the caller saw to it
  gram_KxK: Any = None
  if how.needs_gram:
    gram_KxK = qmatrix.gram_in_quantized_basis(inputs.gram_KxK, layer, smooth_K)
    w_KxO = w_KxO.astype(gram_KxK.dtype)
  scale = quantizers.scale_of(w_KxO, spec, 0) if scale is None else scale
  damping = how.damping if damping is None else damping
  codes, scale = ROUNDERS[how.rounding].round(w_KxO, scale, spec, gram_KxK, damping)
  matrix = QuantizedMatrix(codes, scale, smooth_K)
  return matrix, usable(matrix, layer)


# ---- after the pass: the blocks' matrices as stacks


def _with_stacks(layers: Params, blocks: Sequence[Matrices], recipe: Recipe) -> Params:
  """The parameters of all layers, with the blocks' matrices stacked."""
  stacks = {}
  for kind in dict.fromkeys(kind for block in blocks for kind in block):
    kernel_NxKxO = subtree(layers, kind)[KERNEL]
    whole = [
      block.get(kind) or _plain(kernel_NxKxO[depth], recipe.layer(layer_path(depth, kind)))
      for depth, block in enumerate(blocks)
    ]
    stacks[kind] = _stack(whole)
  return _with_kernels(layers, stacks)


def _plain(kernel_KxO: jax.Array, layer: LayerRecipe | None) -> QuantizedMatrix:
  """A matrix that is not quantized, with its values as codes."""
  # If the inputs are rotated, so must be the matrix.
  codes = kernel_KxO if layer is None else qmatrix.in_quantized_basis(kernel_KxO, layer)
  return QuantizedMatrix(codes, jnp.ones((1, 1), jnp.float32))


def _stack(whole: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
  """One stack of all depths. If codes differ in type, all become floats; if scales differ in shape,
  all are repeated to a common one."""
  width, outputs = whole[0].codes.shape
  if len({weight.codes.dtype for weight in whole}) > 1:
    whole = [weight._replace(codes=weight.codes.astype(jnp.float32)) for weight in whole]
  if len({weight.scale.shape for weight in whole}) > 1:
    shape = (width if any(len(weight.scale) > 1 for weight in whole) else 1, outputs)
    whole = [
      weight._replace(scale=jnp.broadcast_to(quantizers.spread(weight.scale, shape), shape))
      for weight in whole
    ]
  if any(weight.smooth is not None for weight in whole):
    one_K = jnp.ones((width,), jnp.float32)
    whole = [weight._replace(smooth=one_K) if weight.smooth is None else weight for weight in whole]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *whole)
