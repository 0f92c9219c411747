"""Windows cut from the records of a TFDS dataset, tokenized while reading; resumable by document.

Shape letters: b rows of this process, W = L + 1 tokens of a window.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from beyond_outliers import config
from beyond_outliers.data import shards
from beyond_outliers.data.document import Document, checked_ids
from beyond_outliers.data.encoding import encoded_texts, separated
from beyond_outliers.data.splits import is_held_out
from beyond_outliers.data.windows import make_batch
from beyond_outliers.errors import DataError
from beyond_outliers.types import Batch, Json

if TYPE_CHECKING:
  from beyond_outliers.data import tfds

CHUNK_DOCUMENTS = 64  # read at once by a reader


class RecordWindows:
  """Batches from the readers that one process owns, `share` rows per reader, as an iterator that
  grain can prefetch in a thread."""

  def __init__(
    self,
    dataset: shards.Dataset,
    cfg: config.Data,
    context: int,
    seed: int,
    owned: range,
    share: int,
  ):
    from beyond_outliers.data import tfds  # imports TFDS, which token shards don't need

    self._cfg, self._share, self._context = cfg, share, context
    described = dataset.meta["records"]
    if described["count"] < cfg.readers:
      raise DataError(
        f"data.readers = {cfg.readers}: more than the {described['count']} training documents"
      )
    path = shards.in_folder(described["path"], str(dataset.sums.folder))
    tfds.split_files(path)  # refuses a file that is missing
    folder = described["path"].removeprefix("{directory}/")
    dataset.sums.touch(*(name for name in dataset.meta["files"] if name.startswith(f"{folder}/")))
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

  def get_state(self) -> Json:
    return {number: reader.state() for number, reader in self._readers.items()}

  def set_state(self, state: Json) -> None:
    for number, reader in self._readers.items():
      reader.restore(state[number])

  def close(self) -> None:
    for reader in self._readers.values():
      reader.close()


class _Reader:
  """Overlapping windows of an endless run of documents. Its state: the document in which the next
  window begins, and the offset in it."""

  def __init__(self, chunks: grain.DatasetIterator):
    self._chunks = chunks  # the run, CHUNK_DOCUMENTS documents at a time
    # (place in the run, ids) of the documents read, from the one in which the next window begins.
    self._ahead: collections.deque[tuple[int, np.ndarray]] = collections.deque()
    self._first, self._offset = 0, 0

  def next_window(self, tokens_W: np.ndarray, segments_W: np.ndarray) -> None:
    """Fills one row of tokens, and one of segments: 1-based numbers of the window's documents."""
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
    start = CHUNK_DOCUMENTS * grain.experimental.get_next_index(self._chunks)
    for place, ids in enumerate(next(self._chunks), start):
      if ids is not None and place >= self._first:
        self._ahead.append((place, ids))

  def state(self) -> dict[str, int]:
    return {"document": self._ahead[0][0] if self._ahead else self._first, "offset": self._offset}

  def restore(self, state: dict[str, int]) -> None:
    self._ahead.clear()
    self._first, self._offset = state["document"], state["offset"]
    grain.experimental.set_next_index(self._chunks, self._first // CHUNK_DOCUMENTS)

  def close(self) -> None:
    self._chunks.close()


def _document_chunks(
  records: tfds.Records, dataset: shards.Dataset, cfg: config.Data, seed: int, reader: int
) -> grain.DatasetIterator:
  """One reader's documents without end, reshuffled each epoch: lists of CHUNK_DOCUMENTS arrays of
  token ids, separators included."""
  count, held_out = dataset.meta["records"]["count"], dataset.meta["records"]["held_out"]
  order: Any = grain.MapDataset.range(count).seed(seed).shuffle()[reader :: cfg.readers].repeat()
  chunks = grain.MapDataset.range(sys.maxsize // CHUNK_DOCUMENTS).map(
    _Encode(records, order, dataset, cfg.vocab, held_out)
  )
  return iter(chunks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


class _Encode:
  """Maps a chunk's number to its documents' token ids; None for a held-out document."""

  def __init__(
    self,
    records: tfds.Records,
    order: Sequence[int],
    dataset: shards.Dataset,
    vocab: int,
    held_out: float,
  ):
    self._records, self._order, self._vocab, self._held_out = records, order, vocab, held_out
    self._tokenizer, self._separator = dataset.tokenizer, dataset.meta["separator"]

  def __call__(self, chunk: int) -> list[np.ndarray | None]:
    first = chunk * CHUNK_DOCUMENTS
    indices = [self._order[place] for place in range(first, first + CHUNK_DOCUMENTS)]
    kept = [
      None if self._held_out and is_held_out(document.content, self._held_out) else document
      for document in self._records.read(indices)
    ]
    texts = [document for document in kept if document and isinstance(document.content, str)]
    encoded = iter(encoded_texts(texts, self._tokenizer))
    return [self._ids(document, encoded) if document else None for document in kept]

  def _ids(self, document: Document, encoded: Iterator[np.ndarray]) -> np.ndarray:
    ids = next(encoded) if isinstance(document.content, str) else checked_ids(document, self._vocab)
    return separated(ids, self._separator)
