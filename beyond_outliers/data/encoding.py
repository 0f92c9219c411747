"""Encoding: documents to token ids, batches of text at a time, and the separators between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypedDict

import numpy as np

from beyond_outliers.data import tokenizers
from beyond_outliers.data.document import Document, checked_ids

ENCODE_AT_ONCE = 4 << 20  # characters, or ids, handed to the tokenizer's threads
REPORT_SECONDS = 10.0


class Separator(TypedDict):
  """The token between documents."""

  name: str  # eot: after each document | bos: before it
  id: int


class Tokenized(NamedTuple):
  """A document's token ids, and its split."""

  split: str
  ids: np.ndarray  # without the separator
  num_bytes: int  # of the text


def tokenized(
  stream: Iterable[tuple[str, Document]],
  tokenizer: tokenizers.Tokenizer,
  log: Callable[[str], None],
) -> Iterator[Tokenized]:
  """Documents' token ids, in order, encoded a few megabytes at a time; progress goes to `log`."""
  began = reported = time.monotonic()
  count = num_bytes = 0
  for batch in _batches(stream):
    encoded = iter(
      tokenizer.encode_batch(
        [document.content for _, document in batch if isinstance(document.content, str)]
      )
    )
    for split, document in batch:
      if isinstance(document.content, str):
        item = Tokenized(split, next(encoded), len(document.content.encode()))
      else:
        ids = checked_ids(document, tokenizer.vocab_size)
        item = Tokenized(split, ids, len(tokenizer.decode_bytes(ids)))
      count, num_bytes = count + 1, num_bytes + item.num_bytes
      yield item
    if time.monotonic() - reported > REPORT_SECONDS:
      reported = time.monotonic()
      log(
        f"prepare: {count:,} documents, {num_bytes / 1e6:,.0f} MB of text, "
        f"{num_bytes / 1e6 / (reported - began):.1f} MB/s"
      )


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
  """A document's ids with the separator; one that is there is not doubled."""
  mark = np.array([separator["id"]], np.int32)
  if separator["name"] == "eot":
    return ids if np.array_equal(ids[-1:], mark) else np.concatenate([ids, mark])
  return ids if np.array_equal(ids[:1], mark) else np.concatenate([mark, ids])
