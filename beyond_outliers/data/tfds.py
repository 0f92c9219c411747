"""TFDS datasets of documents, without TensorFlow: a builder that writes them as ArrayRecord, and
readers of any prepared one.

A path is a prepared dataset's directory (the one with dataset_info.json), optionally followed by @
and a split: "/data/c4/en/3.0.1@train[:90%]". The default split is train.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import sequential_writer

from beyond_outliers.data.document import Document, as_content
from beyond_outliers.errors import DataError

READ_AT_ONCE = 256  # records per call when reading in order
SHARD_RECORDS = 100_000  # records per file at most


class DocumentBuilder(tfds.core.GeneratorBasedBuilder):
  """A TFDS dataset with one split, train, in the order of `documents`.

  It has one feature: "text", or "tokens" in `ids_dtype` if that is given."""

  name = "documents"
  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded; to search for checksums, TFDS would need a package it doesn't declare.
  url_infos = None

  def __init__(
    self, documents: Iterable[str | np.ndarray], *, data_dir: str, ids_dtype: Any = None
  ):
    self._documents = documents
    self._ids_dtype = ids_dtype
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    # Ids as raw bytes: the default encoding, a list of variable-length integers, takes five times
    # as long to write.
    features = (
      {"text": tfds.features.Text()}
      if self._ids_dtype is None
      else {"tokens": tfds.features.Tensor(shape=(None,), dtype=self._ids_dtype, encoding="bytes")}
    )
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    if self._ids_dtype is None:
      yield from ({"text": text} for text in self._documents)
    else:
      yield from ({"tokens": np.asarray(ids, self._ids_dtype)} for ids in self._documents)

  def _download_and_prepare(self, dl_manager, download_config=None):
    """Writes records in order, with bounded memory.

    TFDS's own way shuffles, in memory up to a gigabyte and beyond that in TensorFlow's files."""
    del download_config
    info = self._info()  # of the temporary directory that TFDS renames at the end
    writer = sequential_writer.SequentialWriter(
      info, max_examples_per_shard=SHARD_RECORDS, file_format="array_record"
    )
    splits = self._split_generators(dl_manager)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)  # pyrefly: ignore[bad-argument-type]  (TFDS says list; it only iterates)
    writer.close_all()
    self.info.set_splits(info.splits)


def write_documents(
  documents: Iterable[str | np.ndarray], directory: str, ids_dtype: Any = None
) -> str:
  """Writes texts, or token ids, as a TFDS dataset below `directory`; returns the dataset's path."""
  tfds.disable_progress_bar()  # preparation has progress lines of its own
  builder = DocumentBuilder(documents, data_dir=directory, ids_dtype=ids_dtype)
  builder.download_and_prepare()
  return str(builder.data_path)


class Records:
  """Random access to documents of a prepared ArrayRecord split; opened lazily, cheap to pickle."""

  def __init__(self, path: str, field: str):
    self.path, self._field = path, field

  def __getstate__(self):
    return {"path": self.path, "_field": self._field}

  @functools.cached_property
  def _source(self):
    builder, split = _open(self.path, self._field)
    split_files(self.path)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
      raise DataError(
        f"data.path = {self.path!r}: prepared as {builder.info.file_format.value}, which has no "
        "random access; set data.reader = 'shards', or prepare it again with "
        "file_format='array_record'"
      )
    return builder.as_data_source(split=split)

  def __len__(self) -> int:
    with _readable(self.path):
      return len(self._source)

  def __getitem__(self, index: int) -> Document:
    (document,) = self.read([index])
    return document

  def read(self, indices: Sequence[int]) -> Iterator[Document]:
    """Documents in the order of the indices, several records per call."""
    for start in range(0, len(indices), READ_AT_ONCE):
      chunk = indices[start : start + READ_AT_ONCE]
      with _readable(self.path):
        examples = self._source.__getitems__(chunk)
      yield from map(self._document, chunk, examples)

  def _document(self, index: int, example: dict[str, Any]) -> Document:
    return _document(example, self._field, f"{self.path}: record {index}")


def split_files(path: str) -> list[str]:
  """The record files of a split. Errors: DataError if one that the description names is missing, or
  lies outside of the dataset's folder."""
  builder, split = _open(path)
  with _readable(path):
    names = [str(part.filename) for part in builder.info.splits[split].file_instructions]
  folder = os.path.normpath(builder.data_path)
  if outside := [name for name in names if os.path.dirname(os.path.normpath(name)) != folder]:
    raise DataError(
      f"data.path = {path!r}: names {outside[0]}, outside of its folder; copy it again"
    )
  missing = [name for name in names if not os.path.isfile(name)]
  if missing:
    raise DataError(f"data.path = {path!r}: {missing[0]} is missing; copy it again")
  return names


def read_split(path: str, field: str) -> Iterator[Document]:
  """Every document of a split in order, from ArrayRecord or TFRecord files."""
  builder, split = _open(path, field)
  split_files(path)
  file_format = builder.info.file_format
  if file_format == tfds.core.FileFormat.ARRAY_RECORD:
    records = Records(path, field)
    yield from records.read(range(len(records)))
  elif file_format == tfds.core.FileFormat.TFRECORD:
    for part in builder.info.splits[split].file_instructions:
      for number, record in enumerate(_tfrecords(str(part.filename))):
        if part.skip <= number < part.skip + part.take:
          with _readable(f"{part.filename}: record {number}"):
            example = builder.info.features.deserialize_example_np(record)
          yield _document(example, field, f"{part.filename}: record {number}")
  else:
    raise DataError(
      f"data.path = {path!r}: prepared as {file_format.value}; expected array_record or tfrecord"
    )


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
  """Turns whatever TFDS and its readers raise into a DataError that names the path."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise DataError(
      f"data.path = {path!r}: not readable as a TFDS dataset ({reason}); fix the path, or copy the "
      "dataset again"
    ) from error


def _document(example: dict[str, Any], field: str, where: str) -> Document:
  if example[field] is None:
    raise DataError(f"{where}: has no {field!r}; the file is damaged: copy it again")
  return Document(as_content(example[field], where, field), where)


def _open(path: str, field: str | None = None) -> tuple[Any, str]:
  directory, at, split = path.rpartition("@")
  if not at or os.sep in split or os.path.isdir(path):  # no @, or one in a folder's name
    directory, split = path, ""
  split = split or "train"
  if not os.path.isfile(os.path.join(directory, "dataset_info.json")):
    raise DataError(
      f"data.path = {path!r}: not a prepared TFDS dataset (no dataset_info.json in {directory!r}); "
      "expected the directory of its version, such as .../c4/en/3.0.1"
    )
  with _readable(path):
    _check_features(os.path.join(directory, "features.json"))
    builder = tfds.builder_from_directory(directory)
  name = split.partition("[")[0]
  if name not in builder.info.splits:
    raise DataError(
      f"data.path = {path!r}: no split {name!r}; the dataset has {sorted(builder.info.splits)}"
    )
  if field is not None and field not in builder.info.features:
    raise DataError(
      f"data.path = {path!r}: no feature {field!r} (data.field); it has "
      f"{sorted(builder.info.features)}"
    )
  return builder, split


def _check_features(file: str) -> None:
  """Refuses a features.json whose class names would have TFDS import a module that is not its own.
  Errors: DataError."""
  if not os.path.exists(file):
    return
  with open(file, "rb") as stream:
    pending = [json.loads(stream.read())]
  while pending:
    node = pending.pop()
    if isinstance(node, dict):
      # The key in JSON, in the protocol buffer that it encodes, and in the format before those.
      legacy = node.get("type") if "content" in node else None
      for name in (node.get("pythonClassName"), node.get("python_class_name"), legacy):
        if name is not None and not str(name).startswith("tensorflow_datasets.core.features."):
          raise DataError(
            f"{file}: names the class {name!r}, which TFDS does not have; copy it again"
          )
    pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []


def _tfrecords(file: str) -> Iterator[bytes]:
  """Records of a TFRecord file: length (8 bytes), checksum (4), data, checksum (4)."""
  size = os.path.getsize(file)
  with open(file, "rb") as stream:
    while header := stream.read(12):
      length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
      if stream.tell() + length + 4 > size:  # before reading: a damaged length may exceed memory
        raise DataError(f"{file}: ends within a record, at byte {size}; copy it again")
      data, _ = stream.read(length), stream.read(4)
      yield data
