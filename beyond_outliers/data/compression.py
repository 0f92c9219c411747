"""Compressed files: opened by suffix, and refused where the contents are not what it says."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from beyond_outliers.errors import DataError


class Compression(NamedTuple):
  """A format of compressed files."""

  begins: bytes  # a regular expression that the first bytes match
  open: Callable[[str], Any] | None  # None: not read


def _open_zstandard(file: str) -> IO[bytes]:
  import pyarrow  # takes a while to import

  return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))  # pyrefly: ignore


COMPRESSIONS = {
  ".gz": Compression(rb"\x1f\x8b", gzip.open),
  ".bz2": Compression(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
  ".xz": Compression(rb"\xfd7zXZ\x00", lzma.open),
  ".zst": Compression(rb"\x28\xb5\x2f\xfd", _open_zstandard),
  ".lz4": Compression(rb"\x04\x22\x4d\x18", None),
  ".zip": Compression(rb"PK\x03\x04", None),
  ".7z": Compression(rb"7z\xbc\xaf\x27\x1c", None),
}


@contextlib.contextmanager
def opened(file: str) -> Iterator[IO[bytes]]:
  """A file's bytes, decompressed. Errors: DataError naming the file, also while it is read."""
  try:
    with _opener(file)(file) as stream:
      yield stream
  except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
    raise DataError(f"{file}: damaged, or cannot be read ({error}); copy it again") from None


def _opener(file: str) -> Callable[[str], Any]:
  with open(file, "rb") as stream:
    head = stream.read(16)
  suffix = os.path.splitext(file)[1].lower()
  found = next((name for name, c in COMPRESSIONS.items() if re.match(c.begins, head)), "")
  if suffix in COMPRESSIONS and found != suffix:
    contents = f"{found} data" if found else "no such data" if head else "nothing"
    raise DataError(f"{file}: named {suffix}, and holds {contents}; rename it, or copy it again")
  if not found:
    return _open_plain
  if suffix != found:
    raise DataError(f"{file}: holds {found} data; name it {file}{found}")
  opener = COMPRESSIONS[found].open
  if opener is None:
    known = ", ".join(name for name, c in COMPRESSIONS.items() if c.open)
    raise DataError(f"{file}: {found} is not read; unpack it, or take one of {known}")
  return opener


def _open_plain(file: str) -> IO[bytes]:
  return open(file, "rb")
