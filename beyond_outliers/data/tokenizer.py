"""Tokenizer: the interface of every kind of tokenizer, and helpers that their modules share."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from beyond_outliers.errors import DataError


def _bytes_of_characters() -> dict[str, int]:
  """The byte that each character of a byte-level BPE's vocabulary stands for."""
  printable = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("\u00a1"), ord("\u00ac") + 1),
    *range(ord("\u00ae"), 256),
  ]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {
    chr(256 + n): byte for n, byte in enumerate(others)
  }


BYTE_OF = _bytes_of_characters()


class Tokenizer:
  """Text to token ids and back.

  Token ids are int32 arrays of values below `vocab_size`; `eot` and `bos` are the ids of the tokens
  that end and begin a text, or None where the vocabulary has none.

  `decode(encode(text)) == text` for bytes, GPT-2 and the SentencePiece models trained here; others
  return the normalized text. A special token spelled out in a text is encoded as ordinary text.
  """

  stored: str  # the name by which `load` opens the copy in a dataset's folder
  vocab_size: int
  eot: int | None
  bos: int | None
  special: dict[str, int]  # name -> id of the tokens that no text is encoded to

  def __init__(self, files: dict[str, bytes]):
    self.special = {}
    self._files = files  # name in a dataset's folder -> content
    self.fingerprint = self.fingerprint_of(files)

  @staticmethod
  def read_files(argument: str) -> dict[str, bytes]:
    """Contents of the tokenizer's files, by their names in a dataset's folder."""
    raise NotImplementedError

  @classmethod
  def fingerprint_of(cls, files: dict[str, bytes]) -> str:
    digest = hashlib.sha256(cls.stored.encode())
    for name, content in sorted(files.items()):
      digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()

  @functools.cached_property
  def ids(self) -> Sequence[int]:
    """The ids that stand for a token, ascending."""
    return range(self.vocab_size)

  def name_eot(self, name: str) -> None:
    """Makes the token of that name `eot`, in place of the tokenizer's own.

    Errors: DataError unless it is a special token."""
    if name not in self.special:
      raise DataError(
        f"data.eot = {name!r}: expected one of the tokenizer's special tokens, "
        f"{self.special_names()}"
      )
    self.eot = self.special[name]

  def special_names(self) -> str:
    """The special tokens, for messages."""
    names = list(self.special)
    return (", ".join(names[:20]) or "of which it has none") + (", ..." if names[20:] else "")

  @property
  def prepended_id(self) -> int | None:
    """The id that transformers puts before a text by default, where a directory's settings don't
    decide; None if it puts none. `encode` never adds it."""
    return None

  def id_of(self, token: str) -> int | None:
    """The id of a token (some kinds know only special ones by name); None if there is none."""
    return self.special.get(token)

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of many texts at once, on all cores where the library has threads."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self.decode_bytes(ids).decode("utf-8", "replace")

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    raise NotImplementedError

  def num_bytes(self, ids: np.ndarray) -> int:
    """UTF-8 bytes of the text that a document's ids, all or the first few, stand for: none for a
    special token; for a part of a character, its share of the character's bytes."""
    raise NotImplementedError

  def first_bytes(self, text: str, ids: np.ndarray) -> int:
    """UTF-8 bytes of a text that its first id stands for, measured in the text as it was before
    any normalizer."""
    del text
    return self.num_bytes(ids[:1])

  def save(self, directory: str) -> None:
    for name, content in self._files.items():
      with open(os.path.join(directory, name), "wb") as file:
        file.write(content)


def read_file(file: str) -> bytes:
  """Contents of a tokenizer's file. Errors: DataError if it is missing."""
  if not os.path.isfile(file):
    raise DataError(f"data.tokenizer: no file {file!r} (in {os.getcwd()})")
  with open(file, "rb") as stream:
    return stream.read()


def needs_extra(kind: str, library: str) -> str:
  """The message where a library is missing that the extra `hf` installs."""
  return (
    f"data.tokenizer = '{kind}': needs the library {library!r}; pip install 'beyond_outliers[hf]'"
  )
