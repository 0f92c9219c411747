"""Writers of a dataset's splits, from one stream of tokenized documents."""

from __future__ import annotations

import array
import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

from beyond_outliers import config
from beyond_outliers.data import shards, shuffle, splits
from beyond_outliers.data.encoding import Separator, Tokenized, separated
from beyond_outliers.types import Json

_PIECE = 1 << 20  # documents


def divert(
  stream: Iterable[Tokenized],
  validation: shards.ShardWriter,
  separator: Separator,
  first_bytes: dict[str, int],
) -> Iterator[Tokenized]:
  """Passes training documents on and writes validation documents. `first_bytes` receives, by a
  document's number, the bytes of its first token where a normalizer changed them."""
  for item in stream:
    if item.split == "train":
      yield item
      continue
    if item.first_bytes is not None and separator["name"] == "eot":
      first_bytes[str(validation.documents)] = item.first_bytes
    validation.append(separated(item.ids, separator), item.num_bytes)


class Repeats:
  """Counts the validation documents that are training documents too, by digests of their ids, eight
  bytes per document."""

  def __init__(self):
    self._digests = {"train": array.array("Q"), "validation": array.array("Q")}

  def watched(self, stream: Iterable[Tokenized]) -> Iterator[Tokenized]:
    for item in stream:
      if len(item.ids):  # training on an empty document teaches nothing
        digest = hashlib.blake2b(item.ids.astype("<i8").tobytes(), digest_size=8).digest()
        self._digests[item.split].frombytes(digest)
      yield item

  def count(self) -> int:
    train, validation = (np.frombuffer(digests, np.uint64) for digests in self._digests.values())
    known = np.unique(validation)
    # In pieces, since numpy.isin would sort both arrays whole.
    pieces = (train[start : start + _PIECE] for start in range(0, len(train), _PIECE))
    found = [np.intersect1d(known, piece) for piece in pieces]
    return int(np.isin(validation, np.concatenate(found)).sum()) if found else 0


def write_shards(
  stream: Iterable[Tokenized],
  cfg: config.Data,
  directory: str,
  separator: Separator,
  dtype: np.dtype,
) -> tuple[Json, None]:
  """Writes the training documents as token shards, shuffled."""
  writer = shards.ShardWriter(directory, "train", dtype, cfg.shard_tokens)
  documents = ((separated(item.ids, separator), item.num_bytes) for item in stream)
  buckets = shuffle.num_buckets(sum(splits.input_files(cfg).values()))
  folder = os.path.join(directory, "shuffle")
  for ids, num_bytes in shuffle.shuffled(documents, folder, cfg.seed, buckets):
    writer.append(ids, num_bytes)
  return writer.close(), None


def write_records(
  stream: Iterable[Tokenized],
  cfg: config.Data,
  directory: str,
  separator: Separator,
  dtype: np.dtype,
) -> tuple[Json, Json]:
  """Writes the training documents' ids as TFDS ArrayRecord. Separators are added when reading, as
  for a user's own records."""
  from beyond_outliers.data import tfds

  del cfg
  counts = {"documents": 0, "tokens": 0, "bytes": 0}

  def counted() -> Iterator[np.ndarray]:
    for item in stream:
      counts["documents"] += 1
      counts["tokens"] += len(separated(item.ids, separator))
      counts["bytes"] += item.num_bytes
      yield item.ids

  path = tfds.write_documents(
    counted(), os.path.join(directory, "records"), dtype.newbyteorder("=").type
  )
  records = {
    "path": "{directory}/" + os.path.relpath(path, directory),
    "field": "tokens",
    "count": counts["documents"],
    "held_out": 0.0,
  }
  return {**counts, "shards": None}, records
