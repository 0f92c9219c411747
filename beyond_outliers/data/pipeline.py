"""Batches out of a prepared dataset, exactly resumable. The only module that imports grain.

Both readers deal the same global batch to any number of processes: process p of P gets rows [p *
B/P, (p + 1) * B/P).

Shape letters: B rows of a global batch, b rows of this process, L context, W = L + 1 tokens of a
window.
"""

from __future__ import annotations

import collections
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from beyond_outliers.data import shards
from beyond_outliers.data.documents import Document, is_held_out
from beyond_outliers.data.encoding import checked_ids, separated
from beyond_outliers.data.windows import make_batch, num_windows, read_windows, rows_of
from beyond_outliers.errors import DataError
from beyond_outliers.types import Batch

CHUNK = 64  # documents that a reader of TFDS records takes at once


def train_batches(
  dataset: shards.Dataset,
  cfg: Any,
  *,
  context: int,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Batches without end, reshuffled each epoch; the rows of one process. `cfg` is the data section.

  Errors: DataError naming the field where the sizes don't divide or the dataset is of the other
  reader; from the iterator, where a token id is outside data.vocab.
  """
  rows = rows_of(process_index, process_count, batch_size)
  return READERS[cfg.reader](dataset, cfg, context, batch_size, seed, rows)


class Batches:
  """An endless iterator whose place can be saved. `state()` describes the place after the last
  batch handed out, in JSON's types and independent of the process count; batches read ahead don't
  count."""

  def __init__(self, iterator: Any):
    self._iterator = iterator
    # Grain's iterators close themselves when they are deleted, which must happen before the
    # interpreter takes its modules down.
    weakref.finalize(self, vars(self).clear)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def state(self) -> dict[str, Any]:
    raise NotImplementedError

  def restore(self, state: dict[str, Any]) -> None:
    raise NotImplementedError

  def close(self) -> None:
    self._iterator.close()


# ---- windows of token shards
# --------------------------------------------------------------------------------------------


class ShardBatches(Batches):
  """Batch k is a function of the seed and k alone: its state is the number of batches, one for all
  processes."""

  def __init__(self, dataset, cfg, context, batch_size, seed, rows):
    windows = _ShuffledWindows(dataset.stream("train"), cfg, context, batch_size, seed, rows)
    batches = grain.MapDataset.range(sys.maxsize // batch_size).map(windows)
    super().__init__(
      iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=cfg.prefetch))
      )
    )

  def state(self):
    return {"batches": grain.experimental.get_next_index(self._iterator)}

  def restore(self, state):
    if state.keys() != {"batches"}:
      raise DataError(
        f"data.reader = 'shards': the saved data position {_keys(state)} is of another reader"
      )
    grain.experimental.set_next_index(self._iterator, state["batches"])


class _ShuffledWindows:
  """k -> the process's rows of global batch k."""

  def __init__(
    self,
    stream: shards.TokenStream,
    cfg: Any,
    context: int,
    batch_size: int,
    seed: int,
    rows: range,
  ):
    self._stream, self._cfg, self._context, self._batch_size, self._rows = (
      stream,
      cfg,
      context,
      batch_size,
      rows,
    )
    if len(stream) <= context:
      raise DataError(
        f"context = {context}: the {len(stream)} training tokens make no window; take a shorter "
        "one, or more text"
      )
    # Reshuffled by epoch; grain's shuffle is a function, so the order of billions of windows takes
    # no memory.
    self._order = (
      grain.MapDataset.range(num_windows(len(stream), context)).seed(seed).shuffle().repeat()
    )

  def __call__(self, k: int) -> Batch:
    first = k * self._batch_size
    order = np.array([self._order[first + row] for row in self._rows], np.int64)
    # The last window is drawn back to the stream's end: rather some targets twice than the rest of
    # a window never.
    begins = np.minimum(order * self._context, len(self._stream) - 1 - self._context)
    tokens_bxW, documents_bxW = read_windows(self._stream, begins, self._context)
    return make_batch(
      tokens_bxW, documents_bxW - documents_bxW[:, :1] + 1, self._cfg, f"training batch {k}"
    )


# ---- straight from TFDS records
# -----------------------------------------------------------------------------------------


class RecordBatches(Batches):
  """`cfg.readers` readers, each with every readers-th document of the shuffled dataset, fill equal
  runs of rows; a process owns as many consecutive readers as fit its rows. The state is that of the
  readers owned, by number; the merged states of all processes restore any of them, under any
  process count."""

  def __init__(self, dataset, cfg, context, batch_size, seed, rows):
    if dataset.meta["records"] is None:
      raise DataError(
        f"data.reader = 'tfds': {dataset.directory} holds token shards; set data.reader = 'shards'"
      )
    if batch_size % cfg.readers:
      raise DataError(f"data.readers = {cfg.readers}: must divide batch_size ({batch_size})")
    share = batch_size // cfg.readers
    if len(rows) % share:
      raise DataError(
        f"data.readers = {cfg.readers}: must be a multiple of the number of processes "
        f"({batch_size // len(rows)})"
      )
    self._readers, self._owned = cfg.readers, range(rows.start // share, rows.stop // share)
    self._windows = _RecordWindows(dataset, cfg, context, seed, self._owned, share)
    super().__init__(grain.experimental.ThreadPrefetchDatasetIterator(self._windows, cfg.prefetch))

  def state(self):
    return self._iterator.get_state()

  def restore(self, state):
    expected = {str(number) for number in range(self._readers)}
    if not {str(number) for number in self._owned} <= state.keys() <= expected:
      raise DataError(
        f"data.readers = {self._readers}: the saved data position {_keys(state)} is of another "
        "number of readers, "
        "of another data.reader, or not merged from all processes"
      )
    self._iterator.set_state({str(number): state[str(number)] for number in self._owned})

  def close(self):
    super().close()
    self._windows.close()


class _RecordWindows:
  """The batches of the readers that one process owns; grain reads ahead of it in a thread."""

  def __init__(
    self, dataset: shards.Dataset, cfg: Any, context: int, seed: int, owned: range, share: int
  ):
    from beyond_outliers.data import tfds  # imports TFDS, which token shards don't need

    self._cfg, self._share, self._context = cfg, share, context
    described = dataset.meta["records"]
    if described["count"] < cfg.readers:
      raise DataError(
        f"data.readers = {cfg.readers}: more than the {described['count']} training documents"
      )
    path = described["path"].format(directory=dataset.directory)
    tfds.files(path)  # all there?
    records = tfds.Records(path, described["field"])
    self._readers = {
      str(number): _Reader(_document_chunks(records, dataset, cfg, seed, number))
      for number in owned
    }

  def __iter__(self):
    return self

  def __next__(self) -> Batch:
    tokens_bxW = np.zeros((len(self._readers) * self._share, self._context + 1), np.int32)
    segments_bxW = np.zeros_like(tokens_bxW)
    for first, reader in enumerate(self._readers.values()):
      for row in range(first * self._share, (first + 1) * self._share):
        reader.next_window(tokens_bxW[row], segments_bxW[row])
    return make_batch(tokens_bxW, segments_bxW, self._cfg, "the TFDS records")

  def get_state(self) -> dict[str, Any]:
    return {number: reader.state() for number, reader in self._readers.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    for number, reader in self._readers.items():
      reader.restore(state[number])

  def close(self) -> None:
    for reader in self._readers.values():
      reader.close()


class _Reader:
  """Cuts an endless run of documents into overlapping windows. Its place: which document the next
  window begins in, and how far into it."""

  def __init__(self, chunks: Any):
    self._chunks = chunks  # the run, CHUNK documents at a time
    self._ahead = (
      collections.deque()
    )  # (place in the run, ids) from the document that the next window begins in
    self._first, self._offset = 0, 0

  def next_window(self, tokens_W: np.ndarray, segments_W: np.ndarray) -> None:
    """Fills one row of each."""
    filled, offset, segment = 0, self._offset, 0
    while filled < len(tokens_W):
      while segment == len(self._ahead):
        self._read_chunk()
      piece = self._ahead[segment][1][offset : offset + len(tokens_W) - filled]
      segment += 1
      tokens_W[filled : filled + len(piece)] = piece
      segments_W[filled : filled + len(piece)] = segment
      filled, offset = filled + len(piece), 0
    self._offset += len(tokens_W) - 1  # the next window begins with this one's last token
    while self._offset >= len(self._ahead[0][1]):
      self._offset -= len(self._ahead.popleft()[1])

  def _read_chunk(self) -> None:
    start = CHUNK * grain.experimental.get_next_index(self._chunks)
    for place, ids in enumerate(next(self._chunks), start):
      if ids is not None and place >= self._first:
        self._ahead.append((place, ids))

  def state(self) -> dict[str, int]:
    return {"document": self._ahead[0][0] if self._ahead else self._first, "offset": self._offset}

  def restore(self, state: dict[str, int]) -> None:
    self._ahead.clear()
    self._first, self._offset = state["document"], state["offset"]
    grain.experimental.set_next_index(self._chunks, self._first // CHUNK)

  def close(self) -> None:
    self._chunks.close()


def _document_chunks(
  records: Any, dataset: shards.Dataset, cfg: Any, seed: int, reader: int
) -> Any:
  """One reader's documents without end, reshuffled by epoch: lists of CHUNK token id arrays,
  separators included."""
  count, held_out = dataset.meta["records"]["count"], dataset.meta["records"]["held_out"]
  order = grain.MapDataset.range(count).seed(seed).shuffle()[reader :: cfg.readers].repeat()
  chunks = grain.MapDataset.range(sys.maxsize // CHUNK).map(
    _Encode(records, order, dataset, cfg.vocab, held_out)
  )
  return iter(chunks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


class _Encode:
  """Number of a chunk -> its documents' token ids; None for a document that is held out for
  validation."""

  def __init__(
    self, records: Any, order: Any, dataset: shards.Dataset, vocab: int, held_out: float
  ):
    self._records, self._order, self._vocab, self._held_out = records, order, vocab, held_out
    self._tokenizer, self._separator = dataset.tokenizer, dataset.meta["separator"]

  def __call__(self, chunk: int) -> list[np.ndarray | None]:
    found = self._records.read(
      [self._order[place] for place in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    )
    kept = [
      None if self._held_out and is_held_out(document.content, self._held_out) else document
      for document in found
    ]
    texts = [
      document.content for document in kept if document and isinstance(document.content, str)
    ]
    encoded = iter(self._tokenizer.encode_batch(texts) if texts else ())
    return [self._ids(document, encoded) if document else None for document in kept]

  def _ids(self, document: Document, encoded: Iterator[np.ndarray]) -> np.ndarray:
    ids = next(encoded) if isinstance(document.content, str) else checked_ids(document, self._vocab)
    return separated(ids, self._separator)


def _keys(state: dict[str, Any]) -> str:
  return "{" + ", ".join(sorted(state)[:8]) + (", ..." if len(state) > 8 else "") + "}"


READERS: dict[str, Callable[..., Batches]] = {"shards": ShardBatches, "tfds": RecordBatches}
