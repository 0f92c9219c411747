"""Pipeline: training batches from a prepared dataset, endless and exactly resumable.

Both readers divide the same global batch among any number of processes: process p of P gets rows
[p * B/P, (p + 1) * B/P).

Shape letters: B rows of a global batch, b rows of this process, L context, W = L + 1 tokens of a
window.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from beyond_outliers import config
from beyond_outliers.data import shards
from beyond_outliers.data.record_windows import RecordWindows
from beyond_outliers.data.sums import FileSums
from beyond_outliers.data.token_stream import TokenStream
from beyond_outliers.data.windows import make_batch, num_windows, process_rows, read_windows
from beyond_outliers.errors import DataError
from beyond_outliers.types import Batch, Json


def train_batches(
  dataset: shards.Dataset,
  cfg: config.Data,
  *,
  context: int,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Endless batches, reshuffled each epoch: the rows of one process. `cfg` is the data section.

  Errors: DataError naming the field if the sizes don't divide or the dataset was prepared for the
  other reader; from the iterator, if a token id is outside data.vocab, and once a file that was
  read is known to differ from its sum.
  """
  rows = process_rows(process_index, process_count, batch_size)
  return READERS[cfg.reader](dataset, cfg, context, batch_size, seed, rows)


class Batches:
  """Endless iterator of batches whose position can be saved. `state()` is the position after the
  last batch returned, in JSON's types; prefetched batches don't count."""

  def __init__(self, iterator: Any, sums: FileSums):
    self._iterator, self._sums = iterator, sums
    # Grain's iterators close themselves when deleted, which must happen before the interpreter
    # tears down its modules.
    weakref.finalize(self, vars(self).clear)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    self._sums.check()
    with self._sums.blamed():
      return next(self._iterator)

  def state(self) -> Json:
    raise NotImplementedError

  def restore(self, state: Json) -> None:
    raise NotImplementedError

  def close(self) -> None:
    self._iterator.close()


class ShardBatches(Batches):
  """Batches of shuffled windows of token shards. Batch k is a function of the seed and k alone, so
  the state is the number of batches, the same for all processes."""

  def __init__(
    self,
    dataset: shards.Dataset,
    cfg: config.Data,
    context: int,
    batch_size: int,
    seed: int,
    rows: range,
  ):
    windows = _ShuffledWindows(dataset.stream("train"), cfg, context, batch_size, seed, rows)
    batches = grain.MapDataset.range(sys.maxsize // batch_size).map(windows)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=cfg.prefetch)
    super().__init__(iter(batches.to_iter_dataset(options)), dataset.sums)

  def state(self):
    return {"batches": grain.experimental.get_next_index(self._iterator)}

  def restore(self, state):
    if state.keys() != {"batches"}:
      raise DataError(
        f"data.reader = 'shards': the saved data position {_keys(state)} is from another reader"
      )
    grain.experimental.set_next_index(self._iterator, state["batches"])


class _ShuffledWindows:
  """Maps k to one process's rows of global batch k."""

  def __init__(
    self,
    stream: TokenStream,
    cfg: config.Data,
    context: int,
    batch_size: int,
    seed: int,
    rows: range,
  ):
    self._stream, self._cfg = stream, cfg
    self._context, self._batch_size, self._rows = context, batch_size, rows
    if len(stream) <= context:
      raise DataError(
        f"context = {context}: the {len(stream)} training tokens are too few for one window; use a "
        "shorter context, or more text"
      )
    # Reshuffled each epoch; grain's shuffle is a function, so billions of windows take no memory.
    self._order = (
      grain.MapDataset.range(num_windows(len(stream), context)).seed(seed).shuffle().repeat()
    )

  def __call__(self, k: int) -> Batch:
    first = k * self._batch_size
    order = np.array([self._order[first + row] for row in self._rows], np.int64)
    # The last window is moved back to fit the stream: better some targets twice than the last ones
    # never.
    begins = np.minimum(order * self._context, len(self._stream) - 1 - self._context)
    tokens_bxW, documents_bxW = read_windows(self._stream, begins, self._context)
    return make_batch(
      tokens_bxW, documents_bxW - documents_bxW[:, :1] + 1, self._cfg, f"training batch {k}"
    )


class RecordBatches(Batches):
  """Batches straight from TFDS records.

  `cfg.readers` readers, each with every readers-th document of the shuffled dataset, fill equally
  many consecutive rows; a process owns the readers of its rows. The state maps the number of each
  reader owned to that reader's; the merged states of all processes restore any process, under any
  process count."""

  def __init__(
    self,
    dataset: shards.Dataset,
    cfg: config.Data,
    context: int,
    batch_size: int,
    seed: int,
    rows: range,
  ):
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
    self._windows = RecordWindows(dataset, cfg, context, seed, self._owned, share)
    batches = grain.experimental.ThreadPrefetchDatasetIterator(self._windows, cfg.prefetch)
    super().__init__(batches, dataset.sums)

  def state(self):
    return self._iterator.get_state()

  def restore(self, state):
    expected = {str(number) for number in range(self._readers)}
    if not {str(number) for number in self._owned} <= state.keys() <= expected:
      raise DataError(
        f"data.readers = {self._readers}: the saved data position {_keys(state)} is from another "
        "number of readers or another data.reader, or was not merged from all processes"
      )
    self._iterator.set_state({str(number): state[str(number)] for number in self._owned})

  def close(self):
    super().close()
    self._windows.close()


def _keys(state: Json) -> str:
  return "{" + ", ".join(sorted(state)[:8]) + (", ..." if len(state) > 8 else "") + "}"


READERS: dict[str, Callable[..., Batches]] = {"shards": ShardBatches, "tfds": RecordBatches}
