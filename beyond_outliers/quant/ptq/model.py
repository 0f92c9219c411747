"""Quantized models: what post-training quantization returns, with the trained model's interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.errors
import jax
import numpy as np

from beyond_outliers.errors import ConfigError
from beyond_outliers.params import leaves_by_path, parent, stack_path
from beyond_outliers.quant import qmatrix, storage
from beyond_outliers.quant.dot import dot_general_for
from beyond_outliers.quant.ptq.checks import check_quantized
from beyond_outliers.quant.ptq.fallback import Fallback
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.types import Json, LanguageModel, Params, PathLike


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
  """A quantized model, called as any other: model.apply({"params": params}, tokens).

  In `params`, quantized matrices are `QuantizedMatrix`s."""

  model: LanguageModel
  params: Params
  recipe: Recipe  # as the method changed it
  method: str
  fallbacks: tuple[Fallback, ...] = ()  # for matrices that the method could not quantize

  @property
  def size_bytes(self) -> int:
    """Bytes of the parameters as `save` stores them: codes in the bits of their grid, all else in
    its own type."""
    return sum(tensor.nbytes for tensor in storage.pack_model(self)[0].values())

  def save(self, directory: PathLike) -> None:
    """Writes a safetensors file and a description in JSON (storage.py), which `load` reads.

    Errors: ConfigError when the directory holds a model."""
    storage.write_model(directory, *storage.pack_model(self))


def load(directory: PathLike) -> QuantizedModel:
  """The model that `QuantizedModel.save` wrote, on the default device, bit for bit.

  Errors: ConfigError."""
  return restored(*storage.read_model(directory))


def restored(tensors: Mapping[str, np.ndarray], description: Json) -> QuantizedModel:
  """The model that `storage.pack_model` packed.

  Errors: ConfigError, also if the parameters don't fit the model or aren't finite floats."""
  model, params, recipe, method = storage.unpack_model(tensors, description)
  try:
    fallbacks = tuple(Fallback(**each) for each in description.get("fallbacks", ()))
  except TypeError as error:
    raise ConfigError(f"fallbacks: {error}; {storage.REMEDY}") from None
  model = serving(model, params, recipe)
  check_quantized(params)
  try:
    jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 1), np.int32))
  except (flax.errors.FlaxError, TypeError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise ConfigError(f"the tensors do not fit the model ({reason}); {storage.REMEDY}") from error
  return QuantizedModel(model, params, recipe, method, fallbacks)


def serving(model: LanguageModel, params: Params, recipe: Recipe) -> LanguageModel:
  """The model that multiplies by the codes in `params`. Unquantized layers in a stack with
  quantized ones hold their values as codes."""
  of_recipe = dot_general_for(recipe, "jax")
  stacks = {
    parent(path)
    for path, leaf in leaves_by_path(params).items()
    if isinstance(leaf, QuantizedMatrix)
  }

  def dot_general_of(path):
    return of_recipe(path) or (qmatrix.plain_product if stack_path(path) in stacks else None)

  return model.clone(dot_general_for=dot_general_of)
