"""Encoding: documents to token ids, a batch of texts at a time, with separators between them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from beyond_outliers.data import tokenizers
from beyond_outliers.data.document import Document, checked_ids
from beyond_outliers.errors import DataError

# Characters, or ids, per call of the tokenizer: few, since a library may use a hundred bytes of
# memory for each.
ENCODE_AT_ONCE = (1 << 17) * (os.cpu_count() or 1)
REPORT_SECONDS = 10.0


class Separator(TypedDict):
  """The token that separates documents."""

  name: str  # eot: after each document | bos: before it
  id: int


class Tokenized(NamedTuple):
  """A document's token ids, split and bytes."""

  split: str
  ids: np.ndarray  # without the separator
  num_bytes: int  # of the text
  first_bytes: int | None  # of a held-out text's first id, if not the tokenizer's num_bytes of it


def tokenized(
  stream: Iterable[tuple[str, Document]],
  tokenizer: tokenizers.Tokenizer,
  log: Callable[[str], None],
) -> Iterator[Tokenized]:
  """Documents' token ids, in order, encoded a batch at a time; progress goes to `log`."""
  began = reported = time.monotonic()
  count = num_bytes = 0
  for batch in _batches(stream):
    texts = [document for _, document in batch if isinstance(document.content, str)]
    encoded = iter(encoded_texts(texts, tokenizer))
    for split, document in batch:
      text, first = document.content, None
      if isinstance(text, str):
        ids, size = next(encoded), len(text.encode())
        if split == "validation":
          first = tokenizer.first_bytes(text, ids)
          first = None if first == tokenizer.num_bytes(ids[:1]) else first
      else:
        ids = checked_ids(document, tokenizer.vocab_size)
        size = tokenizer.num_bytes(ids)
      item = Tokenized(split, ids, size, first)
      count, num_bytes = count + 1, num_bytes + item.num_bytes
      yield item
    if time.monotonic() - reported > REPORT_SECONDS:
      reported = time.monotonic()
      log(
        f"prepare: {count:,} documents, {num_bytes / 1e6:,.0f} MB of text, "
        f"{num_bytes / 1e6 / (reported - began):.1f} MB/s"
      )


def encoded_texts(texts: Sequence[Document], tokenizer: tokenizers.Tokenizer) -> list[np.ndarray]:
  """Token ids of documents that are texts. Errors: DataError naming the document on which the
  tokenizer's library fails."""
  try:
    return tokenizer.encode_batch([str(text.content) for text in texts]) if texts else []
  except BaseException as error:  # a panic of a Rust library is not an Exception
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
      raise
    if len(texts) > 1:  # one by one, to find the one at fault
      return [ids for text in texts for ids in encoded_texts([text], tokenizer)]
    raise DataError(
      f"{texts[0].where}: the tokenizer fails on this document of {len(texts[0].content):,} "
      f"characters ({' '.join(str(error).split())}); cut it, or leave it out"
    ) from error


def _batches(stream: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
  batch, size = [], 0
  for item in stream:
    batch.append(item)
    size += len(item[1].content)
    if size >= ENCODE_AT_ONCE:
      yield batch
      batch, size = [], 0
  yield batch


def separated(ids: np.ndarray, separator: Separator) -> np.ndarray:
  """A document's ids with the separator, which is not added twice."""
  mark = np.array([separator["id"]], np.int32)
  if separator["name"] == "eot":
    return ids if np.array_equal(ids[-1:], mark) else np.concatenate([ids, mark])
  return ids if np.array_equal(ids[:1], mark) else np.concatenate([mark, ids])
