"""Windows of the token stream, batches made of windows, and the validation batches.

A window is L + 1 tokens: L inputs and, shifted by one, L targets. The next window begins with its
last token, so that every token but the stream's first is a target.

Shape letters: b rows of this process, L context, W = L + 1 tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from beyond_outliers import config
from beyond_outliers.data import shards
from beyond_outliers.data.token_stream import TokenStream
from beyond_outliers.errors import DataError
from beyond_outliers.types import Batch


def num_windows(tokens: int, context: int) -> int:
  """Number of windows that together have every token but the first as a target."""
  return -(-max(0, tokens - 1) // context)


def read_windows(
  stream: TokenStream, begins: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
  """(token ids, 1-based document numbers), both [b, W]; 0 beyond the end of the stream."""
  tokens_bxW = np.zeros((len(begins), context + 1), stream.dtype)
  steps_bxW = np.zeros(tokens_bxW.shape, np.int64)
  # 1-based numbers of the first and the last document in each window.
  first = np.searchsorted(stream.starts, begins, side="right")
  last = np.searchsorted(stream.starts[:-1], begins + context + 1, side="left")
  for row, begin in enumerate(begins):
    tokens = stream.read(int(begin), int(begin) + context + 1)
    tokens_bxW[row, : len(tokens)] = tokens
    steps_bxW[row, 0] = first[row]
    # No two documents start at the same place, since each has at least one token.
    steps_bxW[row, stream.starts[first[row] : last[row]] - begin] = 1
  documents_bxW = np.cumsum(steps_bxW, axis=1)
  documents_bxW[begins[:, None] + np.arange(context + 1) >= len(stream)] = 0
  return tokens_bxW, documents_bxW


def make_batch(
  tokens_bxW: np.ndarray, segments_bxW: np.ndarray, cfg: config.Data, where: str
) -> Batch:
  """The batch of windows, arrays [b, L]. Targets in segment 0, outside any document, weigh 0.

  With `cfg.mask_documents`, positions restart with each document, and a document's first token is
  not a target. Errors: DataError if a token is outside `cfg.vocab`."""
  top = int(tokens_bxW.max())
  if top >= cfg.vocab:  # an embedding would return NaN, or silently another row
    raise DataError(
      f"data.vocab = {cfg.vocab}: token id {top} in {where} is outside it; the dataset has another "
      "vocabulary, or is damaged; python -m beyond_outliers.prepare --verify checks it"
    )
  segments_bxL = segments_bxW[:, :-1].astype(np.int32)
  counted_bxL = segments_bxW[:, 1:] > 0
  places_bxL = np.broadcast_to(np.arange(segments_bxL.shape[1], dtype=np.int32), segments_bxL.shape)
  positions_bxL = places_bxL.copy()
  if cfg.mask_documents:
    restarts_bxL = np.diff(segments_bxL, axis=1, prepend=segments_bxL[:, :1]) != 0
    positions_bxL -= np.maximum.accumulate(np.where(restarts_bxL, places_bxL, 0), axis=1)
    counted_bxL &= segments_bxL == segments_bxW[:, 1:]
  return {
    "tokens": tokens_bxW[:, :-1].astype(np.int32),
    "targets": tokens_bxW[:, 1:].astype(np.int32),
    "segment_ids": segments_bxL,
    "positions": positions_bxL,
    "weights": counted_bxL.astype(np.float32),
  }


class ValidationBatches(Sequence):
  """Batches of the validation documents in their own order, every target once; targets beyond the
  end have weight 0. Batches are read on access; before the last, which every full evaluation
  reads, all of the split's files are compared with their sums.

  unscored_bytes: bytes of text whose tokens are never targets, over all processes' rows."""

  def __init__(
    self,
    stream: TokenStream,
    tokens: int,
    cfg: config.Data,
    context: int,
    batch_size: int,
    rows: range,
    unscored_bytes: int,
  ):
    self.unscored_bytes = unscored_bytes
    self._stream, self._tokens, self._cfg = stream, tokens, cfg
    self._context, self.batch_size, self._rows = context, batch_size, rows

  def __len__(self) -> int:
    return -(-num_windows(self._tokens, self._context) // self.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    return _Reading(self)

  def __getitem__(self, k: int) -> Batch:  # pyrefly: ignore[bad-override]  (no slices)
    if not 0 <= k < len(self):
      raise IndexError(k)
    if k == len(self) - 1:
      self._stream.verify()
    with self._stream.sums.blamed():
      begins = (k * self.batch_size + np.array(self._rows, np.int64)) * self._context
      tokens_bxW, documents_bxW = read_windows(self._stream, begins, self._context)
      beyond_bxW = begins[:, None] + np.arange(self._context + 1) >= self._tokens
      tokens_bxW[beyond_bxW], documents_bxW[beyond_bxW] = 0, 0
      return make_batch(tokens_bxW, documents_bxW, self._cfg, f"validation batch {k}")


class _Reading(Iterator):
  """An iterator over validation batches that keeps their `unscored_bytes`."""

  def __init__(self, batches: ValidationBatches):
    self.unscored_bytes = batches.unscored_bytes
    self._batches, self._next = batches, 0

  def __next__(self) -> Batch:
    if self._next == len(self._batches):
      raise StopIteration
    self._next += 1
    return self._batches[self._next - 1]


def validation_batches(
  dataset: shards.Dataset,
  cfg: config.Data,
  *,
  context: int,
  batch_size: int,
  documents: int,
  process_index: int = 0,
  process_count: int = 1,
) -> ValidationBatches:
  """Batches over the first `documents` validation documents (0: all); every process gets as many.

  segment_ids are the 1-based numbers of the documents in the split, 0 beyond the end, so that
  losses can be summed by document: a target counts for its input token's. Errors: DataError.
  """
  stream = dataset.stream("validation")
  known = len(stream.starts) - 1
  if documents > known:
    raise DataError(
      f"eval.documents = {documents}: the validation split has {known}; give at most that, or 0 "
      "for all"
    )
  with stream.sums.blamed():
    tokens = int(stream.starts[documents or known])
    if tokens < 2:
      raise DataError(
        f"eval.documents = {documents}: their {tokens} tokens contain none to predict; use more "
        "documents"
      )
    # The stream's first token is never a target; if documents are kept apart, no document's is.
    unscored_bytes = dataset.first_bytes((documents or known) if cfg.mask_documents else 1)
  rows = process_rows(process_index, process_count, batch_size)
  return ValidationBatches(stream, tokens, cfg, context, batch_size, rows, unscored_bytes)


def process_rows(process_index: int, process_count: int, batch_size: int) -> range:
  """Rows of a global batch that one process holds. Errors: DataError."""
  if batch_size % process_count:
    raise DataError(
      f"batch_size = {batch_size}: must be a multiple of the number of processes ({process_count})"
    )
  share = batch_size // process_count
  return range(process_index * share, (process_index + 1) * share)
