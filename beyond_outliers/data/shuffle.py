"""Shuffle of a corpus's documents, uniform and in bounded memory.

Documents go to random buckets on disk, and each bucket is permuted in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator

import numpy as np

BUCKET_BYTES = 256 << 20  # of the corpus, approximately, per bucket
MAX_BUCKETS = 256  # each keeps two files open


def num_buckets(corpus_bytes: int) -> int:
  """Number of buckets for a corpus of that size."""
  return min(MAX_BUCKETS, 1 + corpus_bytes // BUCKET_BYTES)


def shuffled(
  documents: Iterable[tuple[np.ndarray, int]], folder: str, seed: int, buckets: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Documents as (token ids, bytes of text), in an order that the seed and the number of buckets
  determine. `folder` holds the buckets until all are read."""
  os.makedirs(folder)
  paths = [
    (os.path.join(folder, f"{bucket}.ids"), os.path.join(folder, f"{bucket}.sizes"))
    for bucket in range(buckets)
  ]
  _scatter(documents, paths, np.random.default_rng([seed, 0]))
  for bucket, (ids_path, sizes_path) in enumerate(paths):
    sizes = np.fromfile(sizes_path, np.int64).reshape(-1, 2)
    starts = np.cumsum(sizes[:, 0]) - sizes[:, 0]
    with open(ids_path, "rb") as ids:
      for i in np.random.default_rng([seed, 1, bucket]).permutation(len(sizes)):
        ids.seek(4 * starts[i])
        yield np.fromfile(ids, np.uint32, sizes[i, 0]), int(sizes[i, 1])
  shutil.rmtree(folder)


def _scatter(
  documents: Iterable[tuple[np.ndarray, int]],
  paths: list[tuple[str, str]],
  rng: np.random.Generator,
) -> None:
  """Appends each document to a random bucket's files: ids, and (tokens, bytes of text)."""
  with contextlib.ExitStack() as stack:
    files = [[stack.enter_context(open(path, "wb")) for path in pair] for pair in paths]
    for tokens, num_bytes in documents:
      ids, sizes = files[rng.integers(len(files))]
      ids.write(tokens.astype(np.uint32).tobytes())
      sizes.write(np.array([len(tokens), num_bytes], np.int64).tobytes())
