"""SentencePiece: a tokenizer from a model's file, run by the library of that name."""

from __future__ import annotations

import itertools

import numpy as np

from beyond_outliers.data.tokenizer import Tokenizer, read_file
from beyond_outliers.errors import DataError

LOWER_BLOCK = "\u2581"  # how SentencePiece writes a space
PRIVATE_USE = range(
  0xE000, 0xF900
)  # characters of three bytes in UTF-8, like U+2581, that hardly any model has


class SentencePiece(Tokenizer):
  """A tokenizer from a SentencePiece model's file."""

  stored = "sentencepiece:{directory}/tokenizer.model"

  @staticmethod
  def read_files(argument):
    return {"tokenizer.model": read_file(argument)}

  def __init__(self, file: str):
    import sentencepiece

    super().__init__(self.read_files(file))
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._files["tokenizer.model"])
    except RuntimeError as error:
      raise DataError(f"data.tokenizer: {file} is not a SentencePiece model ({error})") from None
    self.vocab_size = self._model.vocab_size()
    if not self.vocab_size:  # the library accepts an empty file
      raise DataError(f"data.tokenizer: {file} is not a SentencePiece model (it has no pieces)")
    self.eot, self.bos = _id_or_none(self._model.eos_id()), _id_or_none(self._model.bos_id())
    controls = filter(self._model.is_control, range(self.vocab_size))
    self.special = {self._model.id_to_piece(i): i for i in controls}
    pieces = np.array([self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)], np.int32)
    self._byte_pieces = pieces if all(map(self._model.is_byte, pieces.tolist())) else None

  @property
  def prepended_id(self):
    return self.bos  # as transformers' LlamaTokenizer by default

  def encode_batch(self, texts):
    # A U+2581 in the text would become a space, unless it is encoded as its three bytes.
    if self._byte_pieces is None or not any(LOWER_BLOCK in text for text in texts):
      threads = -1 if len(texts) > 1 else 1  # -1: one per core
      return self._model.encode(list(texts), return_type="numpy", num_threads=threads)
    return [self._encode_lower_blocks(text, self._byte_pieces) for text in texts]

  def _encode_lower_blocks(self, text: str, byte_pieces: np.ndarray) -> np.ndarray:
    """Encodes the text with another three-byte character in U+2581's place, then swaps the bytes.
    Encoding the parts between them won't do: a model may put a space before each."""
    unused = (char for char in map(chr, PRIVATE_USE) if char not in text)
    for stand_in in itertools.islice(unused, 8):  # one may be a piece, or be normalized away
      ids = self._model.encode(text.replace(LOWER_BLOCK, stand_in), return_type="numpy").copy()
      old, new = (byte_pieces[np.frombuffer(c.encode(), np.uint8)] for c in (stand_in, LOWER_BLOCK))
      at = np.flatnonzero((ids[:-2] == old[0]) & (ids[1:-1] == old[1]) & (ids[2:] == old[2]))
      if at.size == text.count(LOWER_BLOCK):
        ids[at[:, None] + np.arange(3)] = new
        return ids
    return self._model.encode(text, return_type="numpy")

  def decode_bytes(self, ids):
    return self._model.decode(np.asarray(ids).tolist(), out_type=bytes)

  def num_bytes(self, ids):
    ids = np.asarray(ids)
    if self._byte_pieces is not None:
      # Byte pieces are counted as "a": a part of a character would decode to the 3 bytes of U+FFFD.
      ids = np.where(np.isin(ids, self._byte_pieces), self._byte_pieces[ord("a")], ids)
    return len(self.decode_bytes(ids))

  def first_bytes(self, text, ids):
    if not ids.size:  # the normalizer left nothing of the text
      return len(text.encode())
    if self._model.is_byte(int(ids[0])) or self.decode(ids) == text:
      return self.num_bytes(ids[:1])
    return self._model.encode(text, return_type="proto").pieces[0].end


def _id_or_none(token: int) -> int | None:
  return token if token >= 0 else None
