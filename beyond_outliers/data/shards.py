"""Shards: a prepared dataset on disk, as flat files of tokens and a meta.json that describes them.

  meta.json            settings, split rule, tokenizer fingerprint, counts, size and SHA-256 of all
                       files below, and a SHA-256 of its own other contents
  tokenizer.*          a copy of the tokenizer's files
  train-00000.bin ...  token ids, uint16 or uint32 little-endian: one stream over all shards,
                       separators included
  train.starts         int64, where each document starts in the stream, then the stream's length
  train.bytes          int64, bytes of text before each document, then the total
  validation...        the same, in the source's order

Everything here is numpy. Positions are 64-bit, since the study's larger runs read tens of billions
of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib

import numpy as np

from beyond_outliers.config.sums import file_sha256, replaced, sealed
from beyond_outliers.data import description, text_bytes, tokenizers
from beyond_outliers.data.sums import FileSums
from beyond_outliers.data.token_stream import TokenStream
from beyond_outliers.errors import DataError
from beyond_outliers.types import Json


class ShardWriter:
  """Appends documents to one split of a dataset."""

  def __init__(self, directory: str, split: str, dtype: np.dtype, shard_tokens: int):
    self._directory, self._split = directory, split
    self._dtype, self._shard_tokens = np.dtype(dtype), shard_tokens
    self._shard: io.BufferedWriter | None = None
    self._room = 0
    self._starts, self._bytes = (open(self._path(f".{name}"), "wb") for name in ("starts", "bytes"))
    self.shards: list[str] = []
    self.documents = self.tokens = self.bytes = 0

  def _path(self, suffix: str) -> str:
    return os.path.join(self._directory, self._split + suffix)

  def append(self, ids: np.ndarray, num_bytes: int) -> None:
    """Appends a document's ids, separator included, and the bytes of text they stand for."""
    self._mark()
    self.documents += 1
    self.tokens += len(ids)
    self.bytes += num_bytes
    while len(ids):
      shard = self._shard if self._shard and self._room else self._next_shard()
      part, ids = ids[: self._room], ids[self._room :]
      shard.write(part.astype(self._dtype).tobytes())
      self._room -= len(part)

  def _mark(self) -> None:
    self._starts.write(np.int64(self.tokens).tobytes())
    self._bytes.write(np.int64(self.bytes).tobytes())

  def _next_shard(self) -> io.BufferedWriter:
    if self._shard:
      self._shard.close()
    suffix = f"-{len(self.shards):05d}.bin"
    self.shards.append(self._split + suffix)
    self._shard, self._room = open(self._path(suffix), "wb"), self._shard_tokens
    return self._shard

  def close(self) -> Json:
    """Counts and shards of this split, for meta.json."""
    self._mark()
    for file in (self._shard, self._starts, self._bytes):
      if file:
        file.close()
    return {
      "documents": self.documents,
      "tokens": self.tokens,
      "bytes": self.bytes,
      "shards": self.shards,
    }


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared dataset, opened.

  `meta` is meta.json; `fingerprint` identifies the contents, wherever the folder lies; `sums`
  compares the files with the SHA-256 of meta.json."""

  directory: str
  meta: Json
  tokenizer: tokenizers.Tokenizer
  sums: FileSums = dataclasses.field(repr=False, compare=False)

  @property
  def fingerprint(self) -> str:
    contents = {
      key: self.meta[key] for key in ("files", "splits", "tokenizer", "separator", "records")
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

  def documents(self, split: str) -> int | None:
    return self.meta["splits"][split]["documents"]

  def tokens(self, split: str) -> int | None:
    """Tokens, separators included; None for training documents that stay in a TFDS dataset."""
    return self.meta["splits"][split]["tokens"]

  def bytes(self, split: str, documents: int = 0) -> int | None:
    """Bytes of text, all or of the first `documents` documents; None where `tokens` is None."""
    if split == "validation" and "first_bytes" not in self.meta:
      return int(self._validation_bytes[: documents or None].sum())
    if not documents:
      return self.meta["splits"][split]["bytes"]
    self.sums.verify([f"{split}.bytes"])
    return int(self.stream(split).bytes[documents])

  @functools.cached_property
  def _validation_bytes(self) -> np.ndarray:
    return text_bytes.counted_again(self.stream("validation"), self.tokenizer)

  def first_bytes(self, documents: int) -> int:
    """Bytes of text that the first tokens of the first validation documents stand for: these tokens
    are not targets where documents are kept apart."""
    exceptions = self.meta.get("first_bytes", {})
    stream = self.stream("validation")
    return int(text_bytes.of_first_tokens(stream, self.tokenizer, documents, exceptions).sum())

  def unigram_entropy(self, split: str, at_most: int = 10_000_000) -> float:
    """Entropy of the frequencies of the first `at_most` tokens, in nats per token: the loss of a
    unigram model."""
    stream = self.stream(split)
    counts = np.bincount(stream.read(0, min(len(stream), at_most)))
    frequencies = counts[counts > 0] / counts.sum()
    return float(-np.sum(frequencies * np.log(frequencies)))

  def stream(self, split: str) -> TokenStream:
    shards = self.meta["splits"][split]["shards"]
    if shards is None:
      raise DataError(
        f"{self.directory}: the {split} documents are TFDS records; set data.reader = 'tfds'"
      )
    return TokenStream(str(self.sums.folder), split, self.meta["dtype"], shards, self.sums)

  def path(self, name: str) -> str:
    return os.path.join(self.directory, name)


def write_meta(directory: str, meta: Json) -> None:
  """Completes a folder with meta.json, which is written last: `meta`, with the size and SHA-256 of
  every other file, and its own sum."""
  names = sorted(
    os.path.relpath(os.path.join(folder, name), directory)
    for folder, _, found in os.walk(directory)
    for name in found
  )
  files = {
    name: {
      "bytes": os.path.getsize(os.path.join(directory, name)),
      "sha256": file_sha256(pathlib.Path(directory, name)),
    }
    for name in names
  }
  replace_meta(directory, {"format": description.FORMAT, **meta, "files": files})


def replace_meta(directory: str, meta: Json) -> None:
  """Replaces a folder's meta.json. Errors: OSError."""
  with replaced(pathlib.Path(directory, "meta.json")) as temporary:
    temporary.write_text(json.dumps(sealed(meta), indent=1))


def open_dataset(directory: str) -> Dataset:
  """Opens a prepared folder. Errors: DataError naming what is missing, truncated, altered or of
  another tokenizer.

  The smallest files are compared with their sums now, the others while they are read; see
  `FileSums`. A symbolic link is resolved once: it may be changed afterwards."""
  given, directory = directory, os.path.realpath(directory)
  meta = description.read_meta(directory)
  for name, expected in meta["files"].items():
    file = os.path.join(directory, name)
    try:
      size = os.path.getsize(file)
    except OSError as error:
      remedy = description.remedy_in(directory, error)
      raise DataError(f"{file}: {error.strerror}; {remedy}") from None
    if size != expected["bytes"]:
      raise DataError(
        f"{file} has {size} bytes, meta.json says {expected['bytes']}; delete the folder and "
        "prepare again"
      )
  sums = FileSums(directory, meta["files"])
  sums.verify_smallest()
  described = meta["tokenizer"]
  if described["stored"] not in [kind.stored for kind in tokenizers.TOKENIZERS.values()]:
    raise DataError(
      f"{os.path.join(directory, 'meta.json')}: tokenizer.stored is {described['stored']!r}, which "
      "is not a copy that prepare makes in the folder; delete the folder and prepare again"
    )
  stored = in_folder(described["stored"], directory)
  tokenizer = tokenizers.load(stored, described.get("eot", ""))
  if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
    raise DataError(
      f"{directory}: its tokenizer has fingerprint {tokenizer.fingerprint[:12]}, meta.json says "
      f"{meta['tokenizer']['fingerprint'][:12]}: the file was replaced; delete the folder and "
      "prepare again"
    )
  return Dataset(given, meta, tokenizer, sums)


def in_folder(stored: str, directory: str) -> str:
  """A path from meta.json with the dataset's folder put in, unless it is absolute."""
  return stored if os.path.isabs(stored) else stored.replace("{directory}", directory)


def verify(dataset: Dataset) -> None:
  """Compares all files' SHA-256 with meta.json's, even if that was done before. Errors: DataError
  naming the first difference."""
  files = dataset.meta["files"]
  FileSums(str(dataset.sums.folder), files).verify(files)
