"""Document: one record of a corpus, text or token ids, and the checks of its contents."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

import numpy as np

from beyond_outliers.errors import DataError

MEND = "fix it, or leave it out"


class Document(NamedTuple):
  """A text, or its token ids, and the place it was read from."""

  content: str | np.ndarray  # text, or token ids of any integer type
  where: str  # file and line, row or record: for messages


def not_utf8(error: UnicodeDecodeError) -> str:
  """What is wrong with a text that isn't UTF-8, and the remedy, for messages."""
  reason = f"{error.reason} at byte {error.start}"
  return f"not UTF-8 text ({reason}); convert it (iconv -t UTF-8), or leave it out"


def as_content(value: Any, where: str, field: str) -> str | np.ndarray:
  """A record's value as text or as token ids.

  Errors: DataError naming the place if it is neither."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise DataError(f"{where}: field {field!r} is {not_utf8(error)}") from None
  if isinstance(value, str):
    try:
      value.encode()  # JSON may hold half a surrogate pair, which no encoding can represent
    except UnicodeEncodeError as error:
      raise DataError(
        f"{where}: field {field!r} holds a lone surrogate at character {error.start}, "
        f"which is half a character; {MEND}"
      ) from None
    return value
  try:
    ids = np.asarray(value) if isinstance(value, (list, np.ndarray)) else None
  except (ValueError, OverflowError):  # lists of unequal lengths, or nested too deeply
    ids = None
  if ids is not None and isinstance(value, list) and bool in set(map(type, value)):
    ids = None  # among numbers, numpy would read booleans as 0 and 1
  if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
    raise DataError(
      f"{where}: field {field!r} holds {abbreviated(value)}; expected text, or a list of token "
      f"ids; {MEND}"
    )
  return ids if ids.size else ids.astype(np.int64)


def checked_ids(document: Document, vocab_size: int) -> np.ndarray:
  """A document's token ids, all in the vocabulary.

  Errors: DataError naming the document and the id."""
  ids = document.content
  assert not isinstance(ids, str)  # texts are encoded, which needs no check
  low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
  if low < 0 or high >= vocab_size:
    raise DataError(
      f"{document.where}: token id {low if low < 0 else high} is outside the vocabulary of "
      f"{vocab_size}; is data.tokenizer the one that the ids come from?"
    )
  return ids


def abbreviated(value: Any) -> str:
  """A value's type and the beginning of its repr, for messages."""
  # repr fails on values nested too deeply, and is slow on long lists.
  shown = reprlib.repr(value) if isinstance(value, (list, dict)) else repr(value)
  return f"{type(value).__name__} {shown if len(shown) < 60 else shown[:60] + '...'}"
