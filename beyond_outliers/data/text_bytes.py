"""Bytes of text that a prepared split's tokens stand for: what its bits per byte are over."""

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

  exceptions: of the documents, by number, whose text a normalizer had changed there."""
  ids, kinds = np.unique(stream.take(stream.starts[:documents]), return_inverse=True)
  sizes = np.array([tokenizer.num_bytes(ids[i : i + 1]) for i in range(len(ids))], np.int64)[kinds]
  for number, size in exceptions.items():
    if int(number) < documents:
      sizes[int(number)] = size
  return sizes


def counted_again(stream: TokenStream, tokenizer: Tokenizer) -> np.ndarray:
  """int64 [documents]: bytes of each document, in a split that was prepared when the special tokens
  among a document's ids still counted with their names, and a part of a character as U+FFFD."""
  sizes = np.diff(stream.bytes)
  for number, before in enumerate(sizes):
    ids = stream.document(number)
    size = tokenizer.num_bytes(ids)
    # The separator at either end may have been among the ids. Else it was a text, normalized.
    as_before = (len(tokenizer.decode_bytes(part)) for part in (ids, ids[:-1], ids[1:]))
    if size != before and before in as_before:
      sizes[number] = size
  return sizes
