"""Checks of Hugging Face tensors against the model that config.json describes, before reading."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from beyond_outliers.config.checks import require
from beyond_outliers.errors import ConfigError

DTYPES = ("F64", "F32", "F16", "BF16")
PREFIX, HEAD, EMBEDDING = "model.", "lm_head.weight", "model.embed_tokens.weight"
COMPARED = 2**22  # numbers of head and embedding that are compared at a time


def of_family(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors, named as in a model with a head: models saved without a head have no PREFIX."""
  if any(name.startswith(PREFIX) for name in tensors):
    return dict(tensors)
  return {name if name == HEAD else PREFIX + name: tensor for name, tensor in tensors.items()}


def without_head(directory: pathlib.Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A tied model's tensors without the head that some files hold; it must equal the embedding.

  Errors: ConfigError."""
  if HEAD in tensors and EMBEDDING in tensors:
    for name in (HEAD, EMBEDDING):  # before they are compared: numpy cannot read all types
      _check_type(directory, name, tensors[name])
    require(
      _equal(tensors[HEAD], tensors[EMBEDDING]),
      f"{directory}: {HEAD}",
      f"not {EMBEDDING}",
      "config.json ties the two (tie_word_embeddings); set it to false there to have both, or "
      f"remove {HEAD}",
    )
  return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def check_tensors(
  directory: pathlib.Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Refuses tensors with other names or shapes than `shapes` has, or of types that are not floats.

  Errors: ConfigError."""
  missing, unexpected = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
  for problem, names in (("missing", missing), ("not of this model", unexpected)):
    if names:
      listed = ", ".join(sorted(names)[:4])
      listed += f" and {len(names) - 4} more" if len(names) > 4 else ""
      raise ConfigError(
        f"directory = '{directory}': tensors {problem}: {listed}; "
        "check config.json against the files"
      )
  for name, shape in shapes.items():
    found = tuple(tensors[name].get_shape())
    if found != shape:
      raise ConfigError(
        f"directory = '{directory}': {name} has shape {found}, config.json makes it {shape}; "
        "check config.json against the files"
      )
    _check_type(directory, name, tensors[name])


def _equal(a: Any, b: Any) -> bool:
  """Whether two matrices in files hold the same numbers, whatever their types."""
  shape = a.get_shape()
  if shape != b.get_shape() or len(shape) != 2:
    return False
  rows = max(1, COMPARED // max(1, shape[1]))
  cuts = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
  return all(np.array_equal(a[cut], b[cut]) for cut in cuts)


def _check_type(directory: pathlib.Path, name: str, tensor: Any) -> None:
  dtype = tensor.get_dtype()
  if dtype not in DTYPES:
    raise ConfigError(
      f"directory = '{directory}': {name} is of type {dtype}, expected one of "
      f"{', '.join(DTYPES)}; choose a checkpoint that is not quantized"
    )
