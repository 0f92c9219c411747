"""Quantized models as arrays of bytes and a description in JSON, and both as files: codes with the
bits that their grid needs.

A matrix [K, O], each layer of a stack by itself, becomes

  <path>/codes         its codes in rows, as digits in base 2^bits (3 for 1.585 bits): as many as
                       fit into a word of 64 bits, the first the lowest, words little-endian.
                       4 bits: two a byte. 3 bits: 21 a word, 3.05 each; 1.585 bits: 40 a word, 1.6
                       each. Floating-point codes are their bits
  <path>/scale         as it is, but for the scales that a format knows in one byte:
  <path>/scale_e8m0      granularity mx: powers of two
  <path>/scale_e4m3,     granularity nv: their product
    <path>/scale_unit
  <path>/smooth        if it has one

and every other parameter stays as it is. A model that is read equals the one that was written, bit
by bit.
Legend: K contraction, O outputs.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from beyond_outliers import config
from beyond_outliers.config.checks import require
from beyond_outliers.config.files import read_json
from beyond_outliers.errors import ConfigError
from beyond_outliers.ops.tensor_files import write_tensors
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
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec
from beyond_outliers.types import Json, Params, PathLike

TENSORS, DESCRIPTION = "model.safetensors", "quantized.json"
VERSION = 1  # of what the docstring says
DESCRIPTION_KINDS = {
  **{"version": int, "model.class": str, "model.config": dict},
  **{"method": str, "recipe": list, "matrices": dict},
}
WORD_BITS = 64
E8M0, E4M3 = np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(ml_dtypes.float8_e4m3fn)


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
      # Where a Hugging Face model's tokenizer lies, for whoever exports this one.
      **({"origin": q.model.origin} if getattr(q.model, "origin", None) else {}),
    },
    "method": q.method,
    "recipe": [[paths, layer and dataclasses.asdict(layer)] for paths, layer in q.recipe.rules],
    "matrices": shapes,
    # Only where there are some: descriptions of all other models stay what they were.
    **({"fallbacks": [each._asdict() for each in q.fallbacks]} if q.fallbacks else {}),
  }


def unpack_model(
  tensors: Mapping[str, np.ndarray], description: Json
) -> tuple[Any, Params, Recipe, str]:
  """(model as it trains, parameters, recipe, method): the inverse of `pack_model`.

  Errors: ConfigError for another version, or tensors that are missing."""
  require(
    description.get("version") == VERSION,
    "version",
    description.get("version"),
    f"this program reads version {VERSION}",
  )
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
    require("codes" in parts, f"{path}/codes", None, "missing; fetch the whole model again")
    matrix = _unpack_matrix(parts, shape, _weights_spec(recipe, path))
    stacks.setdefault(stack_path(path), []).append(matrix)
  params = {path: jnp.asarray(array) for path, array in rest.items()}
  params |= {
    path: _stack(each) if is_stacked(path) else QuantizedMatrix(*each[0])
    for path, each in stacks.items()
  }
  return _model(description["model"]), tree_of(params), recipe, description["method"]


def write_model(directory: PathLike, tensors: dict[str, np.ndarray], description: Json) -> None:
  """A safetensors file and a JSON. Errors: ConfigError when the directory holds such files."""
  directory = pathlib.Path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"directory = '{directory}': {error.strerror}; choose another") from None
  require(
    not any((directory / name).exists() for name in (TENSORS, DESCRIPTION)),
    "directory",
    str(directory),
    "already holds a model; remove it or choose another",
  )
  write_tensors(directory / TENSORS, tensors)
  # Last: the remains of a crash do not pass for a model.
  (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def read_model(directory: PathLike) -> tuple[dict[str, np.ndarray], Json]:
  """The arguments of `write_model`. Errors: ConfigError when the files are not there."""
  directory = pathlib.Path(directory)
  for name in (TENSORS, DESCRIPTION):
    require(
      (directory / name).exists(),
      "directory",
      str(directory),
      f"holds no {name}; give what save() of a quantized model wrote to",
    )
  remedy = "fetch the whole model again"
  description = read_json(directory / DESCRIPTION, ConfigError, remedy, DESCRIPTION_KINDS)
  try:
    return safetensors.numpy.load_file(directory / TENSORS), description
  except (OSError, safetensors.SafetensorError) as error:
    raise ConfigError(f"{directory / TENSORS}: {error}; {remedy}") from None


def _matrices(path: str, weight: QuantizedMatrix) -> list[tuple[str, QuantizedMatrix]]:
  """(path, matrix) of every layer of a stack, paths with the depth as a recipe's rules see it, or
  of the one matrix."""
  if not is_stacked(path):
    return [(path, weight)]
  depths = range(len(weight.codes))
  return [(at_depth(path, depth), slice_at(weight, depth)) for depth in depths]


def pack_digits(digits: np.ndarray, bits: float) -> np.ndarray:
  """Whole numbers from 0 to below 2^bits as bytes, in whole words."""
  places = _places(bits)
  padded = np.pad(digits.reshape(-1).astype(np.uint64), (0, -digits.size % len(places)))
  words = (padded.reshape(-1, len(places)) * places).sum(axis=1, dtype=np.uint64)
  return words.astype("<u8").view(np.uint8)


def unpack_digits(packed: np.ndarray, bits: float, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 digits of this shape."""
  words = packed.view("<u8").astype(np.uint64)[:, None]
  digits = words // _places(bits) % np.uint64(round(2**bits))
  return digits.astype(np.uint8).reshape(-1)[: math.prod(shape)].reshape(shape)


def _places(bits: float) -> np.ndarray:
  """The value of a digit at every place of a word."""
  return np.uint64(round(2**bits)) ** np.arange(WORD_BITS // bits, dtype=np.uint64)


def _weights_spec(recipe: Recipe, path: str) -> QuantSpec | None:
  layer = recipe.layer(parent(path))
  return layer.weights if layer else None


def _pack_matrix(weight: QuantizedMatrix, spec: QuantSpec | None) -> dict[str, np.ndarray]:
  """spec None: one that is not quantized, in a stack of others that are."""
  codes_KxO, scale = np.asarray(weight.codes), np.asarray(weight.scale)
  if spec is None:
    parts = {"codes": codes_KxO, "scale": scale}
  else:
    codes_KxO, grid = codes_KxO.astype(spec.levels.dtype), spec.levels
    if isinstance(grid, Uniform):
      digits = (codes_KxO.astype(np.int32) - grid.lowest) // grid.gap
    else:
      digits = codes_KxO.view(np.uint8)
    parts = {"codes": pack_digits(digits, spec.bits), **_pack_scale(scale, spec.granularity)}
  return parts if weight.smooth is None else {**parts, "smooth": np.asarray(weight.smooth)}


def _unpack_matrix(
  parts: Mapping[str, np.ndarray], shape: list[int], spec: QuantSpec | None
) -> tuple[Any, Any, Any]:
  """The fields of a QuantizedMatrix, on the host."""
  scale, smooth = _unpack_scale(parts), parts.get("smooth")
  if spec is None:
    return parts["codes"], scale, smooth
  digits, grid = unpack_digits(parts["codes"], spec.bits, tuple(shape)), spec.levels
  if isinstance(grid, Uniform):
    codes = digits.astype(np.int32) * grid.gap + grid.lowest
  else:
    codes = digits.view(grid.dtype)
  return codes.astype(grid.dtype), scale, smooth


def _pack_scale(scale: np.ndarray, granularity: str) -> dict[str, np.ndarray]:
  """In bytes where these say exactly the same."""
  if granularity == "mx":
    exponents = scale.astype(E8M0)
    if np.array_equal(exponents.astype(scale.dtype), scale):
      return {"scale_e8m0": exponents.view(np.uint8)}
  if granularity == "nv":
    # The largest scale is e4m3's largest number times the unit, rounded: which leaves the unit's
    # neighbours in question.
    guess = scale.max() / scale.dtype.type(ml_dtypes.finfo(E4M3).max) or scale.dtype.type(1)
    for unit in (guess, np.nextafter(guess, 0 * guess), np.nextafter(guess, 2 * guess)):
      factors = (scale / unit).astype(E4M3)
      if np.array_equal(factors.astype(scale.dtype) * unit, scale):
        return {"scale_e4m3": factors.view(np.uint8), "scale_unit": unit.reshape(1)}
  return {"scale": scale}


def _unpack_scale(parts: Mapping[str, np.ndarray]) -> np.ndarray:
  if "scale_e8m0" in parts:
    return parts["scale_e8m0"].view(E8M0).astype(np.float32)
  if "scale_e4m3" in parts:
    unit = parts["scale_unit"]
    return parts["scale_e4m3"].view(E4M3).astype(unit.dtype) * unit
  return parts["scale"]


def _stack(each: list[tuple[Any, Any, Any]]) -> QuantizedMatrix:
  """The stack that was saved: where layers' codes are of several types, they all were floats."""
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
  """The model, by its class's name: quantization takes any model under the contract."""
  module, _, name = described["class"].rpartition(".")
  require(
    module.startswith(f"{__name__.split('.')[0]}."),
    "model.class",
    described["class"],
    "not a model of this package",
  )
  whence = {"origin": described["origin"]} if "origin" in described else {}
  return getattr(importlib.import_module(module), name)(
    config.Model(**described["config"]), **whence
  )
