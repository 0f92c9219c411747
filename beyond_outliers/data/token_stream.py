"""Token stream: one split of a prepared dataset, read from its shards through memory maps."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from beyond_outliers.data import description
from beyond_outliers.data.sums import FileSums, Stamp
from beyond_outliers.errors import DataError

OPEN_SHARDS = 256  # memory maps kept open; each holds a file descriptor


class TokenStream:
  """The tokens of one split as one long array, over lazily opened memory maps; picklable.

  Files are compared with their SHA-256 sums in the background while they are read. Errors:
  DataError from `read` once one is known to differ, and from `verify`."""

  def __init__(self, directory: str, split: str, dtype: str, shards: list[str], sums: FileSums):
    self._arguments = (directory, split, dtype, shards, sums)
    self._directory, self._split, self._shards, self.sums = directory, split, shards, sums
    self.dtype = np.dtype(dtype)
    sizes = [self._size(shard) // self.dtype.itemsize for shard in shards]
    self._offsets = np.cumsum([0, *sizes], dtype=np.int64)
    self._map = functools.lru_cache(OPEN_SHARDS)(self._map_shard)

  def __reduce__(self):
    return TokenStream, self._arguments

  def verify(self) -> None:
    """Compares those of the split's files with their sums that have not been compared yet."""
    self.sums.verify([*self._shards, f"{self._split}.starts", f"{self._split}.bytes"])

  def _map_shard(self, shard: int) -> np.ndarray:
    return self._memory_map(self._shards[shard], self.dtype)

  def _memory_map(self, name: str, dtype: Any) -> np.ndarray:
    """A memory-mapped file as a plain array: slicing an np.memmap costs ten times as much."""
    with _readable(self._directory, name) as path, open(path, "rb") as file:
      self.sums.opened(name, Stamp.of(os.fstat(file.fileno())))
      return np.asarray(np.memmap(file, dtype, "r"))

  def _size(self, name: str) -> int:
    with _readable(self._directory, name) as path:
      return os.path.getsize(path)

  def __len__(self) -> int:
    return int(self._offsets[-1])

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """int64 [documents + 1]: where each document starts, then the stream's length."""
    return self._memory_map(f"{self._split}.starts", np.int64)

  @functools.cached_property
  def bytes(self) -> np.ndarray:
    """int64 [documents + 1]: bytes of text before each document, then the total."""
    return self._memory_map(f"{self._split}.bytes", np.int64)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) in the shards' dtype; fewer where the stream ends before `stop`."""
    self.sums.check()
    stop = min(stop, len(self))
    shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
    parts = []
    while start < stop:
      first, last = int(self._offsets[shard]), min(stop, int(self._offsets[shard + 1]))
      parts.append(self._map(shard)[start - first : last - first])
      start, shard = last, shard + 1
    return (
      parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, self.dtype)
    )

  def take(self, positions: np.ndarray) -> np.ndarray:
    """Tokens at the given positions, which must ascend."""
    shards = np.searchsorted(self._offsets, positions, side="right") - 1
    parts = [
      self._map(int(shard))[positions[shards == shard] - self._offsets[shard]]
      for shard in np.unique(shards)
    ]
    return np.concatenate(parts)

  def document(self, number: int) -> np.ndarray:
    """The ids of one document, its separator included."""
    return self.read(int(self.starts[number]), int(self.starts[number + 1]))


@contextlib.contextmanager
def _readable(directory: str, name: str) -> Iterator[str]:
  """Turns the OSError of a file that has vanished or cannot be read into a DataError."""
  path = os.path.join(directory, name)
  try:
    yield path
  except OSError as error:
    remedy = description.remedy_in(directory, error)
    raise DataError(f"{path}: {error.strerror}; {remedy}") from None
