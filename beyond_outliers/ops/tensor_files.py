"""Safetensors files: the package's only writer, and a check that safetensors' readers don't make.

safetensors' numpy writer (0.8.0) silently stores an array in its memory order
(findings/safetensors_numpy_reorders.sh): an array that is transposed, or comes from LAPACK, would
be read back with its numbers permuted.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from beyond_outliers.config.sums import replaced
from beyond_outliers.types import PathLike


def write_tensors(
  file: PathLike, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
  """Writes named arrays, whatever their memory order, to a file that appears only when complete."""
  rows_first = {name: np.asarray(array, order="C") for name, array in tensors.items()}
  with replaced(file) as temporary:
    safetensors.numpy.save_file(rows_first, temporary, metadata)


def repeated_name(file: PathLike) -> str:
  """The name of a tensor that a file's header lists twice, or "". safetensors (0.8.0) silently
  takes the last one, and other readers may take the first."""
  repeated = []

  def look(pairs: list[tuple[str, Any]]) -> None:
    counts = collections.Counter(name for name, _ in pairs)
    repeated.extend(name for name, count in counts.items() if count > 1)

  with open(file, "rb") as stream:
    json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=look)
  return repeated[0] if repeated else ""
