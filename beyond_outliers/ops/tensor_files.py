"""Safetensors files of arrays: the only writer of them.

safetensors' numpy writer (0.8.0) stores an array in the order of its memory and says nothing
(findings/safetensors_numpy_reorders.sh): one that is transposed, or comes from LAPACK, would be
read back with its numbers permuted.
"""

from __future__ import annotations

from collections.abc import Mapping

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
