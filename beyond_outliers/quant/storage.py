"""Quantized models as arrays and a JSON description, in memory and as files. Codes take only the
bits that their grid needs.

A matrix [K, O], each layer of a stack separately, becomes

  <path>/codes         its codes, row by row, as digits in base 2^bits (3 for 1.585 bits): as many
                       as fit into a 64-bit word, lowest digit first, words little-endian.
                       4 bits: 2 per byte. 3 bits: 21 per word, 3.05 bits each; 1.585 bits: 40 per
                       word, 1.6 bits each. The digit of a floating-point code is its bits
  <path>/scale         as it is, unless a format stores its scales in one byte:
  <path>/scale_e8m0      granularity mx: powers of two
  <path>/scale_e4m3,     granularity nv: the scale is their product
    <path>/scale_unit
  <path>/smooth        if the matrix has one

and every other parameter stays as it is. A model reads back bit for bit as it was written: the
files' SHA-256 sums are stored with them, and a file that differs is refused.
Legend: K contraction, O outputs.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from beyond_outliers import config
from beyond_outliers.config.checks import require
from beyond_outliers.config.files import make_folder, read_json
from beyond_outliers.config.sums import check_folder, file_sha256, replaced, write_folder_sums
from beyond_outliers.errors import ConfigError, remedy_for
from beyond_outliers.ops.tensor_files import repeated_name, write_tensors
from beyond_outliers.params import (
  at_depth,
  is_stacked,
  leaves_by_path,
  parent,
  slice_at,
  stack_path,
  tree_of,
)
from beyond_outliers.quant.grids import Uniform
from beyond_outliers.quant.packing import pack_digits, pack_scale, unpack_digits, unpack_scale
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec
from beyond_outliers.types import Json, Params, PathLike

TENSORS, DESCRIPTION = "model.safetensors", "quantized.json"
VERSION = 1  # of the layout above
DESCRIPTION_KINDS = {
  **{"version": int, "model.class": str, "model.config": dict},
  **{"method": str, "recipe": list, "matrices": dict},
}
# Model classes that files may name: the name in a file -> where the class is. A saved model still
# opens after its class has moved, and no file can make this import anything else.
MODEL_CLASSES = {
  "beyond_outliers.model.transformer.Transformer": (
    "beyond_outliers.model.transformer",
    "Transformer",
  )
}
REMEDY = "fetch the whole model again"


def pack_model(q: Any) -> tuple[dict[str, np.ndarray], Json]:
  """({path: array}, description for JSON) of a QuantizedModel."""
  tensors: dict[str, np.ndarray] = {}
  shapes: dict[str, list[int]] = {}
  for path, leaf in leaves_by_path(q.params).items():
    if not isinstance(leaf, QuantizedMatrix):
      tensors[path] = np.asarray(leaf)
      continue
    for one, weight in _matrices(path, leaf):
      shapes[one] = list(weight.codes.shape)
      parts = _pack_matrix(weight, _weights_spec(q.recipe, one))
      tensors.update({f"{one}/{name}": part for name, part in parts.items()})
  kind = type(q.model)
  return tensors, {
    "version": VERSION,
    "model": {
      "class": f"{kind.__module__}.{kind.__qualname__}",
      "config": dataclasses.asdict(q.model.config),
      # Where a Hugging Face model's tokenizer is, for exports.
      **({"origin": q.model.origin} if getattr(q.model, "origin", None) else {}),
    },
    "method": q.method,
    "recipe": [[paths, layer and dataclasses.asdict(layer)] for paths, layer in q.recipe.rules],
    "matrices": shapes,
    # Only if there are any, so that the descriptions of all other models do not change.
    **({"fallbacks": [each._asdict() for each in q.fallbacks]} if q.fallbacks else {}),
  }


def unpack_model(
  tensors: Mapping[str, np.ndarray], description: Json
) -> tuple[Any, Params, Recipe, str]:
  """(model as it trains, parameters, recipe, method): the inverse of `pack_model`.

  Errors: ConfigError for another version, a model of another class, missing tensors, and anything
    that does not fit together."""
  require(
    description.get("version") == VERSION,
    "version",
    description.get("version"),
    f"this program reads version {VERSION}",
  )
  try:
    return _unpacked(tensors, description)
  except ConfigError:
    raise
  except (TypeError, ValueError, LookupError, AttributeError) as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ConfigError(f"the description does not fit its tensors ({reason}); {REMEDY}") from error


def _unpacked(
  tensors: Mapping[str, np.ndarray], description: Json
) -> tuple[Any, Params, Recipe, str]:
  recipe = Recipe(
    tuple((paths, layer and _layer_recipe(layer)) for paths, layer in description["recipe"])
  )
  rest, stacks = dict(tensors), {}
  for path, shape in description["matrices"].items():
    parts = {
      name.removeprefix(f"{path}/"): rest.pop(name)
      for name in tensors
      if name.startswith(f"{path}/")
    }
    require("codes" in parts, f"{path}/codes", None, f"missing; {REMEDY}")
    matrix = _unpack_matrix(parts, shape, _weights_spec(recipe, path))
    stacks.setdefault(stack_path(path), []).append(matrix)
  params = {path: jnp.asarray(array) for path, array in rest.items()}
  params |= {
    path: _stack(each) if is_stacked(path) else QuantizedMatrix(*each[0])
    for path, each in stacks.items()
  }
  return _model(description["model"]), tree_of(params), recipe, description["method"]


def write_model(directory: PathLike, tensors: dict[str, np.ndarray], description: Json) -> None:
  """Writes a safetensors file, a JSON file, and the sums of both.

  Errors: ConfigError when the directory already holds such files, or cannot be written."""
  directory = pathlib.Path(directory)
  make_folder(directory, ConfigError, "choose another", "directory")
  require(
    not any((directory / name).exists() for name in (TENSORS, DESCRIPTION)),
    "directory",
    str(directory),
    "already holds a model; remove it or choose another",
  )
  write_tensors(directory / TENSORS, tensors)
  # Written last: what a crash leaves behind does not pass for a model.
  with replaced(directory / DESCRIPTION) as described:
    described.write_text(json.dumps(description, indent=1) + "\n")
    sums = {TENSORS: file_sha256(directory / TENSORS), DESCRIPTION: file_sha256(described)}
    write_folder_sums(directory, sums)


def read_model(directory: PathLike) -> tuple[dict[str, np.ndarray], Json]:
  """(tensors, description) as `write_model` took them.

  Errors: ConfigError when files are missing or differ from what was written; older models have no
    sums to compare with."""
  directory = pathlib.Path(directory)
  for name in (TENSORS, DESCRIPTION):
    require(
      (directory / name).exists(),
      "directory",
      str(directory),
      f"holds no {name}; give the folder that save() of a quantized model wrote to",
    )
  check_folder(directory)
  description = read_json(directory / DESCRIPTION, ConfigError, REMEDY, DESCRIPTION_KINDS)
  try:
    tensors = safetensors.numpy.load_file(directory / TENSORS)
    repeated = repeated_name(directory / TENSORS)
  # AttributeError: for types that numpy lacks.
  except (OSError, AttributeError, safetensors.SafetensorError) as error:
    remedy = remedy_for(error, REMEDY) if isinstance(error, OSError) else REMEDY
    raise ConfigError(f"{directory / TENSORS}: {error}; {remedy}") from None
  require(not repeated, str(directory / TENSORS), repeated, f"appears twice in it; {REMEDY}")
  return tensors, description


def _matrices(path: str, weight: QuantizedMatrix) -> list[tuple[str, QuantizedMatrix]]:
  """(path, matrix) of every layer of a stack, with the depth in the path as in a recipe's rules; or
  of the single matrix."""
  if not is_stacked(path):
    return [(path, weight)]
  depths = range(len(weight.codes))
  return [(at_depth(path, depth), slice_at(weight, depth)) for depth in depths]


def _weights_spec(recipe: Recipe, path: str) -> QuantSpec | None:
  layer = recipe.layer(parent(path))
  return layer.weights if layer else None


def _pack_matrix(weight: QuantizedMatrix, spec: QuantSpec | None) -> dict[str, np.ndarray]:
  """The arrays of one matrix by name. spec None: an unquantized one in a stack that has others."""
  codes_KxO, scale = np.asarray(weight.codes), np.asarray(weight.scale)
  if spec is None:
    parts = {"codes": codes_KxO, "scale": scale}
  else:
    grid = spec.levels
    if isinstance(grid, Uniform):
      digits = (codes_KxO.astype(np.int32) - grid.lowest) // grid.gap
    else:
      digits = codes_KxO.astype(grid.stored).view(np.uint8)
    parts = {"codes": pack_digits(digits, spec.bits), **pack_scale(scale, spec.granularity)}
  return parts if weight.smooth is None else {**parts, "smooth": np.asarray(weight.smooth)}


def _unpack_matrix(
  parts: Mapping[str, np.ndarray], shape: list[int], spec: QuantSpec | None
) -> tuple[Any, Any, Any]:
  """The fields of a QuantizedMatrix, on the host."""
  scale, smooth = unpack_scale(parts), parts.get("smooth")
  if spec is None:
    if list(parts["codes"].shape) != shape:
      raise ValueError(f"codes should have shape {shape} and have shape {parts['codes'].shape}")
    return parts["codes"], scale, smooth
  digits, grid = unpack_digits(parts["codes"], spec.bits, tuple(shape)), spec.levels
  if isinstance(grid, Uniform):
    codes = digits.astype(np.int32) * grid.gap + grid.lowest
  else:
    codes = digits.view(grid.stored)
  return codes.astype(grid.dtype), scale, smooth


def _stack(each: list[tuple[Any, Any, Any]]) -> QuantizedMatrix:
  """The stack that was saved: if its layers' codes have several types now, all were floats then."""
  codes, scales, smooths = zip(*each, strict=True)
  if len({of_one.dtype for of_one in codes}) > 1:
    codes = [of_one.astype(np.float32) for of_one in codes]
  return QuantizedMatrix(
    jnp.asarray(np.stack(codes)),
    jnp.asarray(np.stack(scales)),
    None if smooths[0] is None else jnp.asarray(np.stack(smooths)),
  )


def _layer_recipe(fields: Mapping[str, Any]) -> LayerRecipe:
  values: dict[str, Any] = {
    name: QuantSpec(**value) if isinstance(value, dict) else value for name, value in fields.items()
  }
  return LayerRecipe(**values)


def _model(described: Mapping[str, Any]) -> Any:
  """The model, made from the stored name of its class and its configuration."""
  name = described["class"]
  known = ", ".join(MODEL_CLASSES)
  require(
    name in MODEL_CLASSES,
    "model.class",
    name,
    f"not a model that can be stored; expected one of {known}",
  )
  module, member = MODEL_CLASSES[name]
  whence = {"origin": described["origin"]} if "origin" in described else {}
  return getattr(importlib.import_module(module), member)(
    config.Model(**described["config"]), **whence
  )
