"""Tokenizers: text to token ids and back, all behind one class. A new kind is a row of TOKENIZERS.

`load("kind:ARGUMENT")` opens one; a prepared dataset keeps a copy of its files, and their
fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from beyond_outliers.data.gpt2 import Gpt2
from beyond_outliers.data.sentence_piece import SentencePiece
from beyond_outliers.data.tokenizer import BYTE_OF, Tokenizer, needs_extra, read_file
from beyond_outliers.errors import DataError

# Names of the tokens that end and begin a text in published Hugging Face tokenizers; the first that
# a vocabulary has is used.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
# Files of a Hugging Face directory's tokenizer, by kind; the first kind whose files all exist is
# the directory's own, for transformers too.
OWN_FILES = {
  "huggingface": ("tokenizer.json",),
  "sentencepiece": ("tokenizer.model",),
  "gpt2": ("vocab.json", "merges.txt"),
}


class Bytes(Tokenizer):
  """One token per UTF-8 byte, then bos and eot: needs no file, and a token's loss is a byte's."""

  stored = "bytes"
  vocab_size, bos, eot = 258, 256, 257

  @staticmethod
  def read_files(argument):
    if argument:
      raise DataError(f"data.tokenizer = 'bytes:{argument}': 'bytes' takes nothing after the colon")
    return {}

  def __init__(self, argument: str = ""):
    super().__init__(self.read_files(argument))

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

  def decode_bytes(self, ids):
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()

  def num_bytes(self, ids):
    return int(np.count_nonzero(np.asarray(ids) < 256))


class HuggingFace(Tokenizer):
  """A tokenizer.json through the `tokenizers` library."""

  stored = "huggingface:{directory}/tokenizer.json"

  @staticmethod
  def read_files(argument):
    return {"tokenizer.json": read_file(argument)}

  def __init__(self, file: str):
    try:
      import tokenizers
    except ImportError:
      raise DataError(needs_extra("huggingface", "tokenizers")) from None
    super().__init__(self.read_files(file))
    try:
      self._model = tokenizers.Tokenizer.from_buffer(self._files["tokenizer.json"])
    except Exception as error:  # the library raises a bare Exception
      raise DataError(
        f"data.tokenizer: {file} is not a Hugging Face tokenizer.json ({error})"
      ) from None
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True
    self._ids = self._model.get_vocab()  # by token
    if not self._ids:
      raise DataError(f"data.tokenizer: {file} has no vocabulary")
    self.ids = sorted(self._ids.values())
    self.vocab_size = 1 + self.ids[-1]  # ids may have gaps
    self.eot, self.bos = self._first_known(EOT_NAMES), self._first_known(BOS_NAMES)
    self._byte_pieces = [self._ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    self._make_special([i for i in (self.eot, self.bos) if i is not None])

  def _make_special(self, ids: Sequence[int]) -> None:
    """Makes these special, whatever the file says: no text that spells one out may become it."""
    self._model.add_special_tokens([self._model.id_to_token(i) for i in ids])
    added = self._model.get_added_tokens_decoder()
    self.special = {token.content: i for i, token in added.items() if token.special}
    self._token_bytes = self._bytes_by_id() if self._is_byte_level() else None

  def name_eot(self, name):
    added = {token.content: i for i, token in self._model.get_added_tokens_decoder().items()}
    if name in added:
      self._make_special([added[name]])
    super().name_eot(name)

  def _first_known(self, names: Sequence[str]) -> int | None:
    return next((i for i in map(self.id_of, names) if i is not None), None)

  def _is_byte_level(self) -> bool:
    """Whether decoding only concatenates the tokens' bytes."""
    decoder = json.loads(self._files["tokenizer.json"]).get("decoder") or {"type": None}
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts] == ["ByteLevel"]

  def _bytes_by_id(self) -> np.ndarray:
    """int64 [vocab_size]: bytes that each token of a byte-level vocabulary stands for."""
    sizes = np.zeros(self.vocab_size, np.int64)
    for token, i in self._ids.items():
      whole = all(map(BYTE_OF.__contains__, token))
      sizes[i] = len(token) if whole else len(token.encode())
    sizes[list(self.special.values())] = 0
    return sizes

  @property
  def prepended_id(self) -> int | None:
    """The id that the file's post-processor puts first, if any."""
    encoding = self._model.encode("a", add_special_tokens=True)
    # Some vocabularies encode "a" to nothing.
    return encoding.ids[0] if encoding.ids and encoding.special_tokens_mask[0] else None

  def id_of(self, token: str) -> int | None:
    return self._model.token_to_id(token)

  def encode_batch(self, texts):
    # The fast variant leaves out the tokens' offsets in the text, which aren't needed.
    encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode_bytes(self, ids):
    return self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=False).encode()

  def num_bytes(self, ids):
    ids = np.asarray(ids)
    if self._token_bytes is not None:
      return int(self._token_bytes[ids].sum())
    ids = ids[np.isin(ids, list(self.special.values()), invert=True)]
    if min(self._byte_pieces) >= 0:
      # Byte pieces are counted as "a": a part of a character would decode to the 3 bytes of U+FFFD.
      ids = np.where(np.isin(ids, self._byte_pieces), self._byte_pieces[ord("a")], ids)
    return len(self.decode_bytes(ids))

  def first_bytes(self, text, ids):
    if not ids.size:  # nothing is left of the text
      return len(text.encode())
    decoded = self.decode(ids)
    if decoded.endswith(text):  # unchanged but for a space that the tokenizer may put first
      return max(0, self.num_bytes(ids[:1]) - len(decoded.encode()) + len(text.encode()))
    (_, end), *others = self._model.encode(text, add_special_tokens=False).offsets
    if others and others[0][0] < end:  # the first tokens share a character: count its own bytes
      return self.num_bytes(ids[:1])
    return len(text[:end].encode())


TOKENIZERS = {
  "bytes": Bytes,
  "sentencepiece": SentencePiece,
  "huggingface": HuggingFace,
  "gpt2": Gpt2,
}


def load(name: str, eot: str = "") -> Tokenizer:
  """Opens 'bytes', 'sentencepiece:FILE.model', 'huggingface:FILE.json', 'gpt2' or 'gpt2:DIR'.

  eot: name of the token that ends a text; empty: the tokenizer's own. Errors: DataError."""
  kind, argument = _kind_of(name)
  tokenizer = kind(argument)
  if eot:
    tokenizer.name_eot(eot)
  return tokenizer


def fingerprint(name: str) -> str:
  """Fingerprint of the tokenizer that `load` would open, by its files alone. Errors: DataError."""
  kind, argument = _kind_of(name)
  return kind.fingerprint_of(kind.read_files(argument))


def _kind_of(name: str) -> tuple[Any, str]:
  """The row of TOKENIZERS that a name selects, and its argument. Errors: DataError."""
  kind, _, argument = name.partition(":")
  if kind not in TOKENIZERS:
    raise DataError(f"data.tokenizer = {name!r}: expected one of {', '.join(TOKENIZERS)}")
  if kind in ("sentencepiece", "huggingface") and not argument:
    raise DataError(f"data.tokenizer = {name!r}: expected '{kind}:FILE'")
  return TOKENIZERS[kind], argument


def own_of(directory: str) -> str:
  """The name by which `load` opens a Hugging Face directory's own tokenizer; empty where it has
  none of a known kind."""
  for kind, names in OWN_FILES.items():
    files = [os.path.join(directory, name) for name in names]
    if all(map(os.path.exists, files)):
      return f"{kind}:{files[0] if len(files) == 1 else directory}"
  return ""


def added_bos(directory: str) -> int | None:
  """The id that a Hugging Face directory's own tokenizer puts before every text; None if it puts
  none.

  As in transformers, add_bos_token of tokenizer_config.json decides; where it isn't given, the
  tokenizer's `prepended_id` does.
  Errors: DataError if the token to be added is not in the vocabulary."""
  tokenizer = load(own_of(directory))
  settings_file = os.path.join(directory, "tokenizer_config.json")
  try:
    settings = json.loads(read_file(settings_file)) if os.path.exists(settings_file) else {}
    adds, token = settings.get("add_bos_token"), settings.get("bos_token")
    name = token["content"] if isinstance(token, dict) else token
  except (ValueError, AttributeError, KeyError, RecursionError) as error:
    raise DataError(
      f"{settings_file}: damaged ({type(error).__name__}: {error}); copy it again"
    ) from None
  if adds is None:
    return tokenizer.prepended_id
  if not adds:
    return None
  found = tokenizer.id_of(name) if isinstance(name, str) else None
  if found is None:
    raise DataError(
      f"{settings_file}: add_bos_token is true, but bos_token = {name!r} is not in the vocabulary"
    )
  return found
