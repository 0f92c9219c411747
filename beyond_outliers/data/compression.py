"""Compressed files: opened by suffix, and refused where the contents don't match it, or decompress
to another compressed file or an archive."""

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

READ_AT_ONCE = 1 << 17  # bytes


class Compression(NamedTuple):
  """A format of compressed files."""

  begins: bytes  # a regular expression that matches the first bytes
  open: Callable[[str], Any] | None  # None: recognized, but not supported


def _open_zstandard(file: str) -> IO[bytes]:
  import pyarrow  # takes a while to import

  return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))  # pyrefly: ignore


class _Streams(io.RawIOBase):
  """The contents of a file's compressed streams, one after the other, up to the file's end.

  bz2.open and lzma.open would silently ignore trailing data that is not a further stream.
  decompressor: makes the decompressor of one stream."""

  def __init__(self, file: str, decompressor: Callable[[], Any]):
    self._file, self._decompressor = open(file, "rb"), decompressor
    self._stream = decompressor()

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    found = b""
    while not found:
      data = b""
      if self._stream.eof or self._stream.needs_input:
        data = self._stream.unused_data or self._file.read(READ_AT_ONCE)
        if self._stream.eof and not data:
          return 0
        if not data:
          raise EOFError("it ends within a stream")
        if self._stream.eof:
          self._stream = self._decompressor()
      found = self._stream.decompress(data, len(buffer))
    buffer[: len(found)] = found
    return len(found)

  def close(self) -> None:
    self._file.close()
    super().close()


def _streams(decompressor: Callable[[], Any]) -> Callable[[str], IO[bytes]]:
  return lambda file: io.BufferedReader(_Streams(file, decompressor), READ_AT_ONCE)


COMPRESSIONS = {
  ".gz": Compression(rb"\x1f\x8b", gzip.open),
  ".bz2": Compression(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _streams(bz2.BZ2Decompressor)),
  ".xz": Compression(rb"\xfd7zXZ\x00", _streams(lzma.LZMADecompressor)),
  ".zst": Compression(rb"\x28\xb5\x2f\xfd", _open_zstandard),
  ".lz4": Compression(rb"\x04\x22\x4d\x18", None),
  ".zip": Compression(rb"PK\x03\x04", None),
  ".7z": Compression(rb"7z\xbc\xaf\x27\x1c", None),
  ".tar": Compression(rb"(?s:.{257})ustar", None),  # uncompressed texts would pass for one text
}


HEAD = 262  # first bytes of a file, enough to recognize every format


@contextlib.contextmanager
def opened(file: str) -> Iterator[IO[bytes]]:
  """A file's decompressed bytes. Errors: DataError naming the file, also while it is read."""
  try:
    opener = _opener(file)
    with opener(file) as stream:
      if opener is not _open_plain and (inner := _format(stream.peek(HEAD))):
        raise DataError(f"{file}: the compressed file holds {inner} data; unpack it")
      yield stream
  except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
    raise DataError(f"{file}: damaged, or cannot be read ({error}); copy it again") from None


def _opener(file: str) -> Callable[[str], Any]:
  with open(file, "rb") as stream:
    head = stream.read(HEAD)
  suffix, found = os.path.splitext(file)[1].lower(), _format(head)
  if suffix in COMPRESSIONS and found != suffix:
    contents = f"{found} data" if found else "other data" if head else "nothing"
    raise DataError(f"{file}: is named {suffix}, but holds {contents}; rename it, or copy it again")
  if not found:
    return _open_plain
  opener = COMPRESSIONS[found].open
  if opener is None:
    known = ", ".join(name for name, c in COMPRESSIONS.items() if c.open)
    raise DataError(f"{file}: {found} is not supported; unpack it, or use one of {known}")
  if suffix != found:
    raise DataError(f"{file}: holds {found} data; rename it to {file}{found}")
  return opener


def _format(head: bytes) -> str:
  """Key in COMPRESSIONS of a file with these first bytes; empty for a plain file."""
  return next((name for name, c in COMPRESSIONS.items() if re.match(c.begins, head)), "")


def _open_plain(file: str) -> IO[bytes]:
  return open(file, "rb")
