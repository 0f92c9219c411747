"""Bytes of text that a prepared split's tokens stand for: the denominator of bits per byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from beyond_outliers.data.tokenizer import Tokenizer

if TYPE_CHECKING:
  from beyond_outliers.data.token_stream import TokenStream


def of_first_tokens(
  stream: TokenStream, tokenizer: Tokenizer, documents: int, exceptions: dict[str, int]
) -> np.ndarray:
  """int64 [documents]: bytes of the first documents' first tokens, which may be the separator.

  exceptions: document number -> bytes, where a normalizer changed the text of the first token."""
  ids, kinds = np.unique(stream.take(stream.starts[:documents]), return_inverse=True)
  sizes = np.array([tokenizer.num_bytes(ids[i : i + 1]) for i in range(len(ids))], np.int64)[kinds]
  for number, size in exceptions.items():
    if int(number) < documents:
      sizes[int(number)] = size
  return sizes


def counted_again(stream: TokenStream, tokenizer: Tokenizer) -> np.ndarray:
  """int64 [documents]: bytes of each document of a split from an older version, which counted
  special tokens by the length of their names and a part of a character as U+FFFD."""
  sizes = np.diff(stream.bytes)
  for number, before in enumerate(sizes):
    ids = stream.document(number)
    size = tokenizer.num_bytes(ids)
    # A separator may have been among the ids. If no count fits, a text was normalized: keep it.
    as_before = (len(tokenizer.decode_bytes(part)) for part in (ids, ids[:-1], ids[1:]))
    if size != before and before in as_before:
      sizes[number] = size
  return sizes
