"""Quantization after training: a trained model in, one that obeys the same contract out.

A method is a row of METHODS: what rotates, what smooths, what rounds. Matrices become codes block after block, from the
statistics of their inputs over all calibration batches (calibration.py).

A tied head is quantized in every call, since the embedding needs its matrix whole: to nearest, whatever the method.
"""
from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from beyond_outliers.checks import ConfigError, fraction, nearest, require
from beyond_outliers.quant import calibration, formats, fusion, quantizers, weights
from beyond_outliers.quant.calibration import Inputs, Stage
from beyond_outliers.quant.dot import dot_general_for
from beyond_outliers.quant.recipes import Contraction, Recipe, stacked
from beyond_outliers.quant.rounding import DAMPING, ROUNDERS
from beyond_outliers.quant.smoothing import ALPHA, SMOOTHINGS
from beyond_outliers.quant.spec import LayerRecipe
from beyond_outliers.quant.weights import Weight


@dataclasses.dataclass(frozen=True)
class Method:
  """rounding: row of ROUNDERS. smoothing: row of SMOOTHINGS, or "". scale, rotation: rows of SCALES and ROTATIONS in the place
  of the recipe's "absmax" and "none", or "". fused: rotations that matrices can take in are (fusion.py). sequential: a block sees
  what the blocks before it make once they are quantized, else what they made in full precision; within a block, layers see each
  other in full precision (the official code without `--true-sequential`). alpha: of smoothquant, 0 to 1: how much of the inputs'
  range goes to the matrix. damping: of gptq, in mean squares of an input. Errors: ConfigError."""
  rounding: str = "nearest"
  smoothing: str = ""
  scale: str = ""
  rotation: str = ""
  fused: bool = False
  sequential: bool = False
  alpha: float = ALPHA
  damping: float = DAMPING

  def __post_init__(self):
    fraction(self, "", "alpha")
    require(0 < self.damping < math.inf, "damping", self.damping, "expected a number above 0, such as 0.01")

  @property
  def options(self) -> tuple[str, ...]:
    """The numbers that it looks at."""
    return ("alpha",) * (self.smoothing == "smoothquant") + ("damping",) * (self.rounding != "nearest")

  @property
  def calibrated(self) -> bool:
    return self.rounding != "nearest" or bool(self.smoothing)

  @property
  def needs_gram(self) -> bool:
    return self.rounding != "nearest" or self.smoothing == "awq"

  def layer(self, layer: LayerRecipe | None, *, rotated: bool = False) -> LayerRecipe | None:
    """What this method makes of a layer's recipe. Gradients have no part in it any more. rotated: the inputs come in so."""
    if layer is None or not (layer.weights or layer.activations):
      return None
    w, x = layer.weights, layer.activations
    if self.scale and w and w.scale == "absmax":
      w = dataclasses.replace(w, scale=self.scale)
    rotation = "none" if rotated else self.rotation if layer.rotation == "none" else ""
    if rotation:
      w, x = (spec and dataclasses.replace(spec, rotation=rotation) for spec in (w, x))
    require(not (self.rotation or self.smoothing) or "learned" not in [spec.scale for spec in (w, x) if spec], "method",
            self.rotation or self.smoothing, "learned scales hold in the basis that they were learned in: take a method that "
            "neither rotates nor smooths")
    return LayerRecipe(w, x)


METHODS: dict[str, Method] = {
  "rtn": Method(),
  "rtn_mse": Method(scale="mse"),                                       # the clip of least squared error of the matrix itself
  "gptq": Method("gptq", sequential=True),                              # arXiv 2210.17323
  "gptq_in_order": Method("gptq_in_order", sequential=True),
  "gptq_mse": Method("gptq", scale="mse", sequential=True),
  "smoothquant": Method(smoothing="smoothquant"),                       # arXiv 2211.10438
  "smoothquant+gptq": Method("gptq", smoothing="smoothquant", sequential=True),
  "awq": Method(smoothing="awq"),                                       # arXiv 2306.00978
  "awq+gptq": Method("gptq", smoothing="awq", sequential=True),
  "hadamard": Method(rotation="hadamard"),                              # of every layer's inputs, as they come in
  "hadamard_mse": Method(scale="mse", rotation="hadamard"),
  "hadamard+gptq": Method("gptq", rotation="hadamard", sequential=True),
  "quarot": Method(rotation="hadamard", fused=True),                    # arXiv 2404.00456
  "quarot+gptq": Method("gptq", rotation="hadamard", fused=True, sequential=True),
  "hadamard+gptq_mse": Method("gptq", scale="mse", rotation="hadamard", sequential=True),
}

OPTION = re.compile(r"\((\w+)=([-+.0-9e]+)\)")     # behind a part of a method's name; its characters may stand in names of files


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
  """model.apply({"params": params}, tokens) as of any model; in `params`, quantized matrices are `Weight`s."""
  model: Any
  params: Any
  recipe: Recipe                   # as the method changed it
  method: str

  @property
  def size_bytes(self) -> int:
    """Of the parameters, as `save` stores them: codes with the bits of their grid, all else in the type that it has."""
    return sum(tensor.nbytes for tensor in formats.pack(self)[0].values())

  def save(self, directory: Any) -> None:
    """Writes what `load` reads: a safetensors file and a description in JSON (formats.py).

    Errors: ConfigError when the directory holds a model."""
    formats.write(directory, *formats.pack(self))


def load(directory: Any) -> QuantizedModel:
  """What `QuantizedModel.save` wrote, on the default device: the same numbers, bit by bit. Errors: ConfigError."""
  return restored(*formats.read(directory))


def restored(tensors: Any, description: Any) -> QuantizedModel:
  """The model that `formats.pack` took apart."""
  model, params, recipe, method = formats.unpack(tensors, description)
  return QuantizedModel(_serving(model, params, recipe), params, recipe, method)


def named(name: str, field: str = "method") -> Method:
  """A row of METHODS, with other numbers where its name sets some: `smoothquant(alpha=0.75)+gptq(damping=0.1)`.

  Errors: ConfigError with the nearest name, the options of the row, or their range."""
  row, options = OPTION.sub("", name), OPTION.findall(name)
  require("(" not in row, field, name, "numbers are written as in smoothquant(alpha=0.75)+gptq(damping=0.1)")
  if row not in METHODS:
    raise ConfigError(f"{field} = {name!r}: unknown method; {nearest(row, METHODS, cutoff=0.4)}")
  known = METHODS[row].options
  for option, _ in options:
    require(option in known and len(options) == len(dict(options)), field, name, f"{row} takes "
            + (" and ".join(f"({one}=NUMBER) once" for one in known) or "no numbers") + f", not {option!r} here")
  try:
    numbers: dict[str, Any] = {option: float(number) for option, number in options}
    return dataclasses.replace(METHODS[row], **numbers)
  except ValueError as error:          # no number, or one out of its range
    raise ConfigError(f"{field} = {name!r}: {error}") from None


def quantize(model: Any, params: Any, recipe: Recipe, method: str = "rtn",
             calibration_batches: Iterable[calibration.Batch] = (), *,
             say: Callable[[str], None] = lambda text: None) -> QuantizedModel:
  """The model with the matrices of all linear layers, and what they multiply, quantized as `recipe` and `method` say.

  model, params: a transformer and its parameters, as it trains. calibration_batches: {"tokens": [B, L]; and "segment_ids" and
  "positions" if documents are kept apart}, for the methods that need some; every token counts, so without padding.
  Errors: ConfigError for an unknown method, parameters that are quantized already, missing batches or such of another tokenizer,
  inputs that are not finite, a recipe that does not fit the model, or learned scales that the parameters do not hold."""
  how = named(method)
  batches, vocab = list(calibration_batches) if how.calibrated else [], model.config.vocab
  require(not how.calibrated or bool(batches), "calibration_batches", batches,
          f"{method} looks at the inputs of every layer: give it some")
  for batch in batches:
    largest = int(np.max(batch["tokens"]))
    require(largest < vocab, "calibration_batches", largest, f"the model knows tokens below {vocab}; take those of its tokenizer")
  model, params, recipe = _prepared(model, params, recipe, how)
  paths = [path.removeprefix("layers/0/") for path in model.contractions() if path.startswith("layers/0/")]

  plain, watching = model.clone(dot_general_for=None), model.clone(dot_general_for=calibration.watched)
  of_recipe = dot_general_for(recipe, "jax")
  serving = model.clone(dot_general_for=of_recipe)
  blocks: list[dict[str, Weight]] = []
  stream = calibration.Stream(plain, params, batches)
  for depth in range(model.config.blocks):
    of_block, inputs = _part(params["layers"], depth), {}
    if how.calibrated:
      inputs = stream.see(Stage(watching.block(depth), of_block), gram=how.needs_gram, run=not how.sequential)
      _check_finite(inputs, f"layers/{depth}")
    layers = {path: recipe.layer(f"layers/{depth}/{path}") for path in paths}
    blocks.append({path: _weight(_at(of_block, path), layer, how, inputs.get(path)) for path, layer in layers.items()
                   if layer is not None and layer.weights is not None})
    if how.sequential:
      stream.run(Stage(serving.block(depth), _with(of_block, blocks[-1])))
    jax.block_until_ready(blocks)
    say(f"{method}: block {depth + 1} of {model.config.blocks}")

  result = {**params, "layers": _with(params["layers"], {
    path: _stack([block.get(path) for block in blocks], _at(params["layers"], path)["kernel"],
                 [recipe.layer(f"layers/{depth}/{path}") for depth in range(len(blocks))])
    for path in paths if any(path in block for block in blocks)})}
  head = recipe.layer("head")
  if "head" in params and head is not None and head.weights is not None:
    inputs = stream.see_head(gram=how.needs_gram) if how.calibrated else None
    result = _with(result, {"head": _weight(params["head"], head, how, inputs)})
  return QuantizedModel(_serving(model, result, recipe), result, recipe, method)


def check(model: Any, params: Any, recipe: Recipe, method: str = "rtn", field: str = "method") -> None:
  """Whether `quantize` takes them, before there are numbers. params: shapes will do. Errors: ConfigError, as there."""
  how = named(method, field)
  jax.eval_shape(lambda params: _prepared(model, params, recipe, how)[1], params)


def quantized(model: Any, params: Any, recipe: Recipe) -> QuantizedModel:
  """A model that was trained under `recipe`, with its matrices as the codes that it multiplied with."""
  return quantize(model, params, recipe)


def _prepared(model: Any, params: Any, recipe: Recipe, how: Method) -> tuple[Any, Any, Recipe]:
  """The model and its parameters with the rotations that they take in, and what the method makes of the recipe.

  Errors: ConfigError, whatever does not go together."""
  require(not any(isinstance(leaf, Weight) for leaf in traverse_util.flatten_dict(params).values()), "params", "quantized",
          "they hold codes already; start from those of a trained model")
  contractions = model.contractions()
  if how.fused:
    model, params, rotated = fusion.fuse(model, params)
    # A rule for every path: what is rotated already does not follow the recipe's.
    rules = ((path, recipe.layer(path), path.split("/", 2)[-1] in rotated) for path in contractions)
    recipe = Recipe(tuple((re.escape(path), how.layer(layer, rotated=is_rotated)) for path, layer, is_rotated in rules))
  else:
    recipe = Recipe(tuple((paths, how.layer(layer)) for paths, layer in recipe.rules))
  recipe.check({path: Contraction(width) for path, (width, _) in contractions.items()})
  for path in contractions:
    layer = recipe.layer(path)
    learns = layer is not None and "learned" in [spec.scale for spec in (layer.weights, layer.activations) if spec]
    embedded = path == "head" and "head" not in params
    require(not learns or embedded or _log_scale(_at(params, stacked(path))) is not None, f"recipe: {path}: scale", "learned",
            "the parameters hold no learned scales; only a model that was trained under this recipe has them")
  return model, params, recipe


def _serving(model: Any, params: Any, recipe: Recipe) -> Any:
  """The model that multiplies with the codes in `params`. Layers that stay as they are, in a stack of which some do not, hold
  their numbers as codes."""
  of_recipe = dot_general_for(recipe, "jax")
  stacks = {"/".join(path[:-1]) for path, leaf in traverse_util.flatten_dict(params).items() if isinstance(leaf, Weight)}

  def dot_general_of(path):
    return of_recipe(path) or (weights.plain_product if stacked(path) in stacks else None)
  return model.clone(dot_general_for=dot_general_of)


def _check_finite(inputs: dict[str, Inputs], where: str) -> None:
  for path, of_layer in inputs.items():
    finite = all(bool(jnp.isfinite(statistic).all()) for statistic in jax.tree.leaves(of_layer))
    require(finite, f"calibration_batches: {where}/{path}", "not finite",
            "the layer's inputs overflow or are no numbers; look at the checkpoint, or at the tokens")


@jax.jit
def _part(layers, depth):
  return jax.tree.map(lambda x: x[depth], layers)


def _at(params: Any, path: str) -> Any:
  return functools.reduce(lambda node, name: node[name], path.split("/"), params)


def _with(params: Any, kernels: dict[str, Weight]) -> Any:
  """The tree with other kernels at these paths."""
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict({**flat, **{f"{path}/kernel": weight for path, weight in kernels.items()}}, sep="/")


def _log_scale(params: Any) -> Any:
  """Learned scales of a linear layer, given its parameters: of activations and weights."""
  return next((node["log_scale"] for node in params.values() if isinstance(node, dict)), None)


def _weight(params: Any, layer: LayerRecipe, how: Method, inputs: Inputs | None) -> Weight:
  """The matrix of one linear layer, given its parameters."""
  learns = layer.weights is not None and layer.weights.scale == "learned"
  scale = jnp.exp(_log_scale(params))[-1].reshape(1, 1) if learns else None
  return _rounded(params["kernel"], inputs, scale, layer, how)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded(kernel_KxO, inputs: Any, scale, layer: LayerRecipe, how: Method) -> Weight:
  smooth_K = SMOOTHINGS[how.smoothing](kernel_KxO, inputs, layer, how.alpha) if how.smoothing else None
  w_KxO, spec = weights.prepare(kernel_KxO, layer, smooth_K), layer.weights
  assert spec is not None            # the caller saw to it
  gram_KxK: Any = None
  if how.needs_gram:
    gram_KxK = weights.prepare_gram(inputs.gram_KxK, layer, smooth_K)
    w_KxO = w_KxO.astype(gram_KxK.dtype)
  scale = quantizers.scale_of(w_KxO, spec, 0) if scale is None else scale
  return Weight(*ROUNDERS[how.rounding](w_KxO, scale, spec, gram_KxK, how.damping), smooth_K)


def _stack(each: Sequence[Weight | None], kernel_NxKxO: jax.Array, layers: Sequence[LayerRecipe | None]) -> Weight:
  """One stack of all depths. Depths whose matrix is not quantized keep its numbers as codes, and all then are floats."""
  def plain(depth):
    kernel_KxO, layer = kernel_NxKxO[depth], layers[depth]
    # Where the inputs are rotated, the matrix has to be.
    return Weight(kernel_KxO if layer is None else weights.prepare(kernel_KxO, layer), jnp.ones((1, 1), jnp.float32))
  whole = [plain(depth) if weight is None else weight for depth, weight in enumerate(each)]
  if len({weight.codes.dtype for weight in whole}) > 1:
    whole = [weight._replace(codes=weight.codes.astype(jnp.float32)) for weight in whole]
  _, width, outputs = kernel_NxKxO.shape
  if len({weight.scale.shape for weight in whole}) > 1:
    shape = (width if any(len(weight.scale) > 1 for weight in whole) else 1, outputs)
    whole = [weight._replace(scale=jnp.broadcast_to(quantizers.spread(weight.scale, shape), shape)) for weight in whole]
  if any(weight.smooth is not None for weight in whole):
    whole = [weight if weight.smooth is not None else weight._replace(smooth=jnp.ones((width,), jnp.float32)) for weight in whole]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *whole)
