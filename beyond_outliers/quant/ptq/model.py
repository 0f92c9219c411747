"""Quantization after training: a trained model in, one that obeys the same contract out.

A method is a row of METHODS (methods.py). Matrices become codes block after block, from the
statistics of their inputs over all calibration batches (calibration.py).

A tied head is quantized in every call, since the embedding needs its matrix whole: to nearest,
whatever the method.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from beyond_outliers.config.checks import require
from beyond_outliers.quant import qmatrix, quantizers, storage
from beyond_outliers.quant.dot import dot_general_for
from beyond_outliers.quant.ptq import calibration, rotation_fusion
from beyond_outliers.quant.ptq.calibration import Inputs, Stage
from beyond_outliers.quant.ptq.gptq import ROUNDERS
from beyond_outliers.quant.ptq.methods import Method, method_named
from beyond_outliers.quant.ptq.smoothing import SMOOTHINGS
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import LinearShape, Recipe, stacked
from beyond_outliers.quant.spec import LayerRecipe


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
  """model.apply({"params": params}, tokens) as of any model; in `params`, quantized matrices are
  `QuantizedMatrix`s."""

  model: Any
  params: Any
  recipe: Recipe  # as the method changed it
  method: str

  @property
  def size_bytes(self) -> int:
    """Of the parameters, as `save` stores them: codes with the bits of their grid, all else in the
    type that it has."""
    return sum(tensor.nbytes for tensor in storage.pack_model(self)[0].values())

  def save(self, directory: Any) -> None:
    """Writes what `load` reads: a safetensors file and a description in JSON (storage.py).

    Errors: ConfigError when the directory holds a model."""
    storage.write_model(directory, *storage.pack_model(self))


def load(directory: Any) -> QuantizedModel:
  """What `QuantizedModel.save` wrote, on the default device: the same numbers, bit by bit. Errors:
  ConfigError."""
  return restored(*storage.read_model(directory))


def restored(tensors: Any, description: Any) -> QuantizedModel:
  """The model that `formats.pack` took apart."""
  model, params, recipe, method = storage.unpack_model(tensors, description)
  return QuantizedModel(_serving(model, params, recipe), params, recipe, method)


def quantize(
  model: Any,
  params: Any,
  recipe: Recipe,
  method: str = "rtn",
  calibration_batches: Iterable[calibration.Batch] = (),
  *,
  say: Callable[[str], None] = lambda text: None,
) -> QuantizedModel:
  """The model with the matrices of all linear layers, and what they multiply, quantized as `recipe`
  and `method` say.

  model, params: a transformer and its parameters, as it trains. calibration_batches: {"tokens": [B,
  L]; and "segment_ids" and "positions" if documents are kept apart}, for the methods that need
  some; every token counts, so without padding.
  Errors: ConfigError for an unknown method, parameters that are quantized already, missing batches
  or such of another tokenizer, inputs that are not finite, a recipe that does not fit the model, or
  learned scales that the parameters do not hold."""
  how = method_named(method)
  batches, vocab = list(calibration_batches) if how.calibrated else [], model.config.vocab
  require(
    not how.calibrated or bool(batches),
    "calibration_batches",
    batches,
    f"{method} looks at the inputs of every layer: give it some",
  )
  for batch in batches:
    largest = int(np.max(batch["tokens"]))
    require(
      largest < vocab,
      "calibration_batches",
      largest,
      f"the model knows tokens below {vocab}; take those of its tokenizer",
    )
  model, params, recipe = _prepared(model, params, recipe, how)
  paths = [
    path.removeprefix("layers/0/") for path in model.contractions() if path.startswith("layers/0/")
  ]

  plain, watching = (
    model.clone(dot_general_for=None),
    model.clone(dot_general_for=calibration.watched),
  )
  of_recipe = dot_general_for(recipe, "jax")
  serving = model.clone(dot_general_for=of_recipe)
  blocks: list[dict[str, QuantizedMatrix]] = []
  stream = calibration.Stream(plain, params, batches)
  for depth in range(model.config.blocks):
    of_block, inputs = _part(params["layers"], depth), {}
    if how.calibrated:
      inputs = stream.see(
        Stage(watching.block(depth), of_block), gram=how.needs_gram, run=not how.sequential
      )
      _check_finite(inputs, f"layers/{depth}")
    layers = {path: recipe.layer(f"layers/{depth}/{path}") for path in paths}
    blocks.append(
      {
        path: _weight(_at(of_block, path), layer, how, inputs.get(path))
        for path, layer in layers.items()
        if layer is not None and layer.weights is not None
      }
    )
    if how.sequential:
      stream.run(Stage(serving.block(depth), _with(of_block, blocks[-1])))
    jax.block_until_ready(blocks)
    say(f"{method}: block {depth + 1} of {model.config.blocks}")

  result = {
    **params,
    "layers": _with(
      params["layers"],
      {
        path: _stack(
          [block.get(path) for block in blocks],
          _at(params["layers"], path)["kernel"],
          [recipe.layer(f"layers/{depth}/{path}") for depth in range(len(blocks))],
        )
        for path in paths
        if any(path in block for block in blocks)
      },
    ),
  }
  head = recipe.layer("head")
  if "head" in params and head is not None and head.weights is not None:
    inputs = stream.see_head(gram=how.needs_gram) if how.calibrated else None
    result = _with(result, {"head": _weight(params["head"], head, how, inputs)})
  return QuantizedModel(_serving(model, result, recipe), result, recipe, method)


def check(
  model: Any, params: Any, recipe: Recipe, method: str = "rtn", field: str = "method"
) -> None:
  """Whether `quantize` takes them, before there are numbers. params: shapes will do. Errors:
  ConfigError, as there."""
  how = method_named(method, field)
  jax.eval_shape(lambda params: _prepared(model, params, recipe, how)[1], params)


def quantized(model: Any, params: Any, recipe: Recipe) -> QuantizedModel:
  """A model that was trained under `recipe`, with its matrices as the codes that it multiplied
  with."""
  return quantize(model, params, recipe)


def _prepared(model: Any, params: Any, recipe: Recipe, how: Method) -> tuple[Any, Any, Recipe]:
  """The model and its parameters with the rotations that they take in, and what the method makes of
  the recipe.

  Errors: ConfigError, whatever does not go together."""
  require(
    not any(
      isinstance(leaf, QuantizedMatrix) for leaf in traverse_util.flatten_dict(params).values()
    ),
    "params",
    "quantized",
    "they hold codes already; start from those of a trained model",
  )
  contractions = model.contractions()
  if how.fused:
    model, params, rotated = rotation_fusion.fuse(model, params)
    # A rule for every path: what is rotated already does not follow the recipe's.
    rules = ((path, recipe.layer(path), path.split("/", 2)[-1] in rotated) for path in contractions)
    recipe = Recipe(
      tuple(
        (re.escape(path), how.layer(layer, rotated=is_rotated)) for path, layer, is_rotated in rules
      )
    )
  else:
    recipe = Recipe(tuple((paths, how.layer(layer)) for paths, layer in recipe.rules))
  recipe.check({path: LinearShape(width) for path, (width, _) in contractions.items()})
  for path in contractions:
    layer = recipe.layer(path)
    learns = layer is not None and "learned" in [
      spec.scale for spec in (layer.weights, layer.activations) if spec
    ]
    embedded = path == "head" and "head" not in params
    require(
      not learns or embedded or _log_scale(_at(params, stacked(path))) is not None,
      f"recipe: {path}: scale",
      "learned",
      "the parameters hold no learned scales; only a model that was trained under this recipe has "
      "them",
    )
  return model, params, recipe


def _serving(model: Any, params: Any, recipe: Recipe) -> Any:
  """The model that multiplies with the codes in `params`. Layers that stay as they are, in a stack
  of which some do not, hold their numbers as codes."""
  of_recipe = dot_general_for(recipe, "jax")
  stacks = {
    "/".join(path[:-1])
    for path, leaf in traverse_util.flatten_dict(params).items()
    if isinstance(leaf, QuantizedMatrix)
  }

  def dot_general_of(path):
    return of_recipe(path) or (qmatrix.plain_product if stacked(path) in stacks else None)

  return model.clone(dot_general_for=dot_general_of)


def _check_finite(inputs: dict[str, Inputs], where: str) -> None:
  for path, of_layer in inputs.items():
    finite = all(bool(jnp.isfinite(statistic).all()) for statistic in jax.tree.leaves(of_layer))
    require(
      finite,
      f"calibration_batches: {where}/{path}",
      "not finite",
      "the layer's inputs overflow or are no numbers; look at the checkpoint, or at the tokens",
    )


@jax.jit
def _part(layers, depth):
  return jax.tree.map(lambda x: x[depth], layers)


def _at(params: Any, path: str) -> Any:
  return functools.reduce(lambda node, name: node[name], path.split("/"), params)


def _with(params: Any, kernels: dict[str, QuantizedMatrix]) -> Any:
  """The tree with other kernels at these paths."""
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict(
    {**flat, **{f"{path}/kernel": weight for path, weight in kernels.items()}}, sep="/"
  )


def _log_scale(params: Any) -> Any:
  """Learned scales of a linear layer, given its parameters: of activations and weights."""
  return next((node["log_scale"] for node in params.values() if isinstance(node, dict)), None)


def _weight(params: Any, layer: LayerRecipe, how: Method, inputs: Inputs | None) -> QuantizedMatrix:
  """The matrix of one linear layer, given its parameters."""
  learns = layer.weights is not None and layer.weights.scale == "learned"
  scale = jnp.exp(_log_scale(params))[-1].reshape(1, 1) if learns else None
  return _rounded(params["kernel"], inputs, scale, layer, how)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded(kernel_KxO, inputs: Any, scale, layer: LayerRecipe, how: Method) -> QuantizedMatrix:
  smooth_K = (
    SMOOTHINGS[how.smoothing](kernel_KxO, inputs, layer, how.alpha) if how.smoothing else None
  )
  w_KxO, spec = qmatrix.in_quantized_basis(kernel_KxO, layer, smooth_K), layer.weights
  assert spec is not None  # the caller saw to it
  gram_KxK: Any = None
  if how.needs_gram:
    gram_KxK = qmatrix.gram_in_quantized_basis(inputs.gram_KxK, layer, smooth_K)
    w_KxO = w_KxO.astype(gram_KxK.dtype)
  scale = quantizers.scale_of(w_KxO, spec, 0) if scale is None else scale
  return QuantizedMatrix(
    *ROUNDERS[how.rounding](w_KxO, scale, spec, gram_KxK, how.damping), smooth_K
  )


def _stack(
  each: Sequence[QuantizedMatrix | None],
  kernel_NxKxO: jax.Array,
  layers: Sequence[LayerRecipe | None],
) -> QuantizedMatrix:
  """One stack of all depths. Depths whose matrix is not quantized keep its numbers as codes, and
  all then are floats."""

  def plain(depth):
    kernel_KxO, layer = kernel_NxKxO[depth], layers[depth]
    # Where the inputs are rotated, the matrix has to be.
    return QuantizedMatrix(
      kernel_KxO if layer is None else qmatrix.in_quantized_basis(kernel_KxO, layer),
      jnp.ones((1, 1), jnp.float32),
    )

  whole = [plain(depth) if weight is None else weight for depth, weight in enumerate(each)]
  if len({weight.codes.dtype for weight in whole}) > 1:
    whole = [weight._replace(codes=weight.codes.astype(jnp.float32)) for weight in whole]
  _, width, outputs = kernel_NxKxO.shape
  if len({weight.scale.shape for weight in whole}) > 1:
    shape = (width if any(len(weight.scale) > 1 for weight in whole) else 1, outputs)
    whole = [
      weight._replace(scale=jnp.broadcast_to(quantizers.spread(weight.scale, shape), shape))
      for weight in whole
    ]
  if any(weight.smooth is not None for weight in whole):
    whole = [
      weight
      if weight.smooth is not None
      else weight._replace(smooth=jnp.ones((width,), jnp.float32))
      for weight in whole
    ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *whole)
