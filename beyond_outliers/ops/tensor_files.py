"""Safetensors files of arrays: the only writer of them, and what its readers leave unsaid.

safetensors' numpy writer (0.8.0) stores an array in the order of its memory and says nothing
(findings/safetensors_numpy_reorders.sh): one that is transposed, or comes from LAPACK, would be
read back with its numbers permuted.
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
  """One file of named arrays, in whatever order they lie in memory; there once it is whole."""
  rows_first = {name: np.asarray(array, order="C") for name, array in tensors.items()}
  with replaced(file) as temporary:
    safetensors.numpy.save_file(rows_first, temporary, metadata)


def repeated_name(file: PathLike) -> str:
  """A tensor's name that stands twice in the header of a file, or nothing. Of two, safetensors
  (0.8.0) takes the last without a word, and other readers may take the first."""
  repeated = []

  def look(pairs: list[tuple[str, Any]]) -> None:
    counts = collections.Counter(name for name, _ in pairs)
    repeated.extend(name for name, count in counts.items() if count > 1)

  with open(file, "rb") as stream:
    json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=look)
  return repeated[0] if repeated else ""
