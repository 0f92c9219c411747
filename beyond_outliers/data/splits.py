"""Splits: the rules that hold out documents for validation, and the files that these rules read.

A rule is a row of SPLITS; `data.validation` gives its name and argument, as in "newest:10".
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from beyond_outliers import config
from beyond_outliers.config.sums import file_sha256
from beyond_outliers.data.document import Document
from beyond_outliers.data.documents import SOURCES, read_documents
from beyond_outliers.errors import DataError
from beyond_outliers.types import Json

LabeledDocuments = Iterator[tuple[str, Document]]  # "train" or "validation", and the document


def split_documents(cfg: config.Data) -> LabeledDocuments:
  """Every document with the name of its split; each split keeps the source's order."""
  rule, argument = validation_rule(cfg)
  return SPLITS[rule](cfg, argument)


def validation_rule(cfg: config.Data) -> tuple[str, str]:
  """The rule's name in SPLITS and its argument, from `data.validation`. Errors: DataError."""
  rule, _, argument = cfg.validation.partition(":")
  if rule not in SPLITS or not argument:
    raise DataError(
      f"data.validation = {cfg.validation!r}: expected 'newest:COUNT', 'fraction:0.01' or "
      "'path:GLOB'"
    )
  return rule, argument


def input_files(cfg: config.Data) -> dict[str, int]:
  """Sizes in bytes of the files that a dataset is made from, by which a stale one is recognized."""
  rule, argument = validation_rule(cfg)
  paths = [cfg.path, argument] if rule == "path" else [cfg.path]
  return {file: os.path.getsize(file) for path in paths for file in SOURCES[cfg.source].files(path)}


def describe_inputs(files: Mapping[str, int]) -> Json:
  """Description of `input_files` that takes no reading: count, bytes, hash of names and sizes."""
  listing = json.dumps([[os.path.basename(name), size] for name, size in files.items()])
  return {
    "files": len(files),
    "bytes": sum(files.values()),
    "sha256": hashlib.sha256(listing.encode()).hexdigest(),
  }


def sum_of_contents(files: Iterable[str]) -> str:
  sums = [file_sha256(pathlib.Path(file)) for file in files]
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def sum_of_places(files: Iterable[str]) -> str:
  """Hash that tells files from others of the same names and sizes: by real paths, since a link may
  be redirected, and by inodes, since renaming a folder leaves its files' times as they were."""
  places = [[os.path.realpath(file), os.stat(file).st_ino] for file in files]
  return hashlib.sha256(json.dumps(places).encode()).hexdigest()


def last_change(files: Iterable[str]) -> int:
  """Latest ctime of the files, in nanoseconds; not mtime, which a copy may preserve."""
  return max(os.stat(file).st_ctime_ns for file in files)


def training_sample(cfg: config.Data, max_bytes: int) -> Iterator[Document]:
  """Every k-th training document, spread over the corpus: at most about `max_bytes` in all."""
  training = (document for split, document in split_documents(cfg) if split == "train")
  return itertools.islice(training, 0, None, sample_stride(cfg, max_bytes))


def sample_stride(cfg: config.Data, max_bytes: int) -> int:
  """The k of `training_sample`."""
  return 1 + sum(input_files(cfg).values()) // max_bytes


def is_held_out(content: str | np.ndarray, fraction: float) -> bool:
  """Whether a document's hash falls in the fraction: a function of its content alone."""
  data = content.encode() if isinstance(content, str) else np.asarray(content, np.int64).tobytes()
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < fraction * 2.0**64


def empty_split(cfg: config.Data, split: str) -> DataError:
  """The error of a rule that leaves a split without documents."""
  return DataError(
    f"data.validation = {cfg.validation!r}: leaves no document for the {split} split; hold out "
    + ("fewer" if split == "train" else "more")
    + ", or read more documents"
  )


def _newest(cfg: config.Data, count: str) -> LabeledDocuments:
  """Validates on the last `count` documents.

  A document waits in a queue until `count` others follow it, and is then not among the last."""
  waiting = collections.deque()
  for document in read_documents(cfg):
    waiting.append(document)
    if len(waiting) > int(count):
      yield "train", waiting.popleft()
  for document in waiting:
    yield "validation", document


def _fraction(cfg: config.Data, fraction: str) -> LabeledDocuments:
  """Validates on a share of the documents, by the hashes of their contents."""
  for document in read_documents(cfg):
    yield "validation" if is_held_out(document.content, float(fraction)) else "train", document


def _path(cfg: config.Data, path: str) -> LabeledDocuments:
  """Validates on other files.

  They come first, so that a mistake in their path shows before the long work begins."""
  source = SOURCES[cfg.source]
  shared = set(source.files(path)) & set(source.files(cfg.path))
  if shared and cfg.source != "tfds":  # in TFDS, two slices of a split may share a file
    raise DataError(
      f"data.validation = 'path:{path}': data.path = {cfg.path!r} names {min(shared)!r} too; "
      "a file trains or validates, not both"
    )
  for document in source.documents(path, cfg.field):
    yield "validation", document
  for document in read_documents(cfg):
    yield "train", document


SPLITS: dict[str, Callable[[config.Data, str], LabeledDocuments]] = {
  "newest": _newest,
  "fraction": _fraction,
  "path": _path,
}
