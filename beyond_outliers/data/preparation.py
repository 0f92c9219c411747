"""Preparation: documents -> tokens -> a dataset folder, once; whoever comes later opens it.

The folder's name carries a fingerprint of every setting that shapes its contents. It is filled
under another name and renamed when complete, behind a lock, so that a killed preparation leaves
nothing that could be taken for data and two that race do the work once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from beyond_outliers.data import documents, shards, tokenizers
from beyond_outliers.data.documents import Document
from beyond_outliers.data.encoding import Tokenized, separated, tokenized
from beyond_outliers.errors import DataError

SHAPING = (
  "source",
  "path",
  "field",
  "tokenizer",
  "separator",
  "validation",
  "reader",
  "seed",
  "shard_tokens",
)
TOKENIZER_SAMPLE = 64 << 20  # bytes of the corpus, about, that a SentencePiece model is trained on
BUCKET_BYTES = 256 << 20  # of the corpus, about, that one bucket of the shuffle holds in memory
MAX_BUCKETS = 256  # each holds two files open


def prepare(cfg: Any, *, log: Callable[[str], None] = print) -> shards.Dataset:
  """Opens the dataset that the data section describes, preparing it first if it isn't there.
  Errors: DataError."""
  directory = dataset_directory(cfg)
  if not os.path.isdir(directory):
    os.makedirs(cfg.directory, exist_ok=True)
    with _lock(directory, log):
      if not os.path.isdir(directory):
        _make(cfg, directory, log)
  dataset = shards.open_dataset(directory)
  _check(dataset, cfg, log)
  return dataset


def dataset_directory(cfg: Any) -> str:
  settings = {name: getattr(cfg, name) for name in SHAPING}
  kind = cfg.tokenizer.partition(":")[0]
  if cfg.tokenizer == "sentencepiece":
    settings["vocab"] = (
      cfg.vocab
    )  # the model trained here has exactly this size; other tokenizers bring their own
    kind += str(cfg.vocab)
  fingerprint = hashlib.sha256(
    json.dumps([shards.FORMAT, settings], sort_keys=True).encode()
  ).hexdigest()
  return os.path.join(cfg.directory, f"{cfg.source}-{kind}-{fingerprint[:10]}")


@contextlib.contextmanager
def _lock(directory: str, log: Callable[[str], None]) -> Iterator[None]:
  """Held by one process at a time; the kernel lets go of it when the process ends, however it
  ends."""
  with open(directory + ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f"prepare: another process prepares {directory}; waiting")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _make(cfg: Any, directory: str, log: Callable[[str], None]) -> None:
  here = f"{directory}.partial-{socket.gethostname()}-"
  for leftover in glob.glob(glob.escape(here) + "*"):  # of preparations that were killed
    shutil.rmtree(leftover)
  partial = here + str(os.getpid())
  os.makedirs(partial)
  try:
    shards.write_meta(partial, _fill(cfg, partial, log))
    if not os.path.isdir(
      directory
    ):  # else a host that our lock does not reach was first: its work is as good
      os.rename(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _check(dataset: shards.Dataset, cfg: Any, log: Callable[[str], None]) -> None:
  """Refuses a dataset that the configuration or the source files have moved away from."""
  tokenizer = dataset.tokenizer
  _check_vocab(tokenizer, cfg)
  if (
    cfg.tokenizer != "sentencepiece"
    and (configured := tokenizers.load(cfg.tokenizer).fingerprint) != tokenizer.fingerprint
  ):
    raise DataError(
      f"data.tokenizer = {cfg.tokenizer!r}: now has fingerprint {configured[:12]}, "
      f"{dataset.directory} was made "
      f"with {tokenizer.fingerprint[:12]}; restore the tokenizer's file, or delete the folder to "
      "prepare again"
    )
  try:
    found = _describe(documents.inputs(cfg))
  except DataError as error:  # prepared data outlive their source
    log(f"prepare: using {dataset.directory}; its source is not here to compare with ({error})")
    return
  if found != dataset.meta["inputs"]:
    raise DataError(
      f"data.path = {cfg.path!r}: the files differ from those that {dataset.directory} was made "
      "from "
      f"({found['files']} files of {found['bytes']} bytes now, {dataset.meta['inputs']['files']} "
      "of "
      f"{dataset.meta['inputs']['bytes']} then); restore them, or delete the folder to prepare "
      "again"
    )


def _check_vocab(tokenizer: tokenizers.Tokenizer, cfg: Any) -> None:
  if tokenizer.vocab_size > cfg.vocab:
    raise DataError(
      f"data.vocab = {cfg.vocab}: the tokenizer {cfg.tokenizer!r} has {tokenizer.vocab_size} "
      "tokens; "
      "raise data.vocab to at least that"
    )


def _describe(files: dict[str, int]) -> dict[str, Any]:
  listing = json.dumps([[os.path.basename(name), size] for name, size in files.items()])
  return {
    "files": len(files),
    "bytes": sum(files.values()),
    "sha256": hashlib.sha256(listing.encode()).hexdigest(),
  }


def _fill(cfg: Any, directory: str, log: Callable[[str], None]) -> dict[str, Any]:
  """Writes everything but meta.json, and returns that."""
  inputs = documents.inputs(cfg)
  log(
    f"prepare: {cfg.source} ({len(inputs)} files, {sum(inputs.values()) / 1e6:.1f} MB) -> "
    f"{dataset_directory(cfg)}"
  )
  tokenizer = _tokenizer(cfg, directory, log)
  _check_vocab(tokenizer, cfg)
  separator = {"name": cfg.separator, "id": getattr(tokenizer, cfg.separator)}
  if separator["id"] is None:
    raise DataError(
      f"data.separator = {cfg.separator!r}: the tokenizer {cfg.tokenizer!r} has no such token; "
      "expected the other of 'eot', 'bos', or another tokenizer"
    )
  dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

  def writer(split: str) -> shards.ShardWriter:
    return shards.ShardWriter(directory, split, dtype, cfg.shard_tokens)

  validation = writer("validation")
  stream = _InPlace(cfg).validation() if _in_place(cfg) else documents.split(cfg)
  training = _divert(tokenized(stream, tokenizer, log), validation, separator)
  first = list(itertools.islice(training, 1))
  records = None
  if _in_place(cfg):
    train, records = _InPlace(cfg).training()
  elif not first:
    raise _empty(cfg, "train")
  elif cfg.reader == "tfds":
    train, records = _write_records(itertools.chain(first, training), directory, separator, dtype)
  else:
    buckets = min(MAX_BUCKETS, 1 + sum(inputs.values()) // BUCKET_BYTES)
    train = _write_shuffled(
      itertools.chain(first, training), directory, writer("train"), separator, cfg.seed, buckets
    )
  splits = {"train": train, "validation": validation.close()}
  if not validation.documents:
    raise _empty(cfg, "validation")
  return {
    "settings": {name: getattr(cfg, name) for name in (*SHAPING, "vocab")},
    "inputs": _describe(inputs),
    "tokenizer": {
      "name": cfg.tokenizer,
      "stored": tokenizer.stored,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
    },
    "separator": separator,
    "dtype": dtype.str,
    "splits": splits,
    "records": records,
  }


def _in_place(cfg: Any) -> bool:
  """Whether training documents stay in the TFDS dataset they come from."""
  return cfg.reader == "tfds" and cfg.source == "tfds"


def _empty(cfg: Any, split: str) -> DataError:
  return DataError(
    f"data.validation = {cfg.validation!r}: leaves no document to the {split} split; hold out "
    + ("fewer" if split == "train" else "more")
  )


# ---- tokens
# -------------------------------------------------------------------------------------------------------------


def _tokenizer(cfg: Any, directory: str, log: Callable[[str], None]) -> tokenizers.Tokenizer:
  """The configured tokenizer, trained if need be; a copy goes to the dataset's folder."""
  if cfg.tokenizer == "sentencepiece":
    began = time.monotonic()
    sample = (
      _InPlace(cfg).sample if _in_place(cfg) else functools.partial(documents.training_sample, cfg)
    )
    texts = [_text(document, cfg) for document in sample(TOKENIZER_SAMPLE)]
    if not texts:
      raise _empty(cfg, "train")
    file = os.path.join(directory, "tokenizer.model")
    with open(file, "wb") as stream:
      stream.write(tokenizers.train_sentencepiece(texts, cfg.vocab))
    log(
      f"prepare: trained a SentencePiece model of {cfg.vocab} pieces in "
      f"{time.monotonic() - began:.1f} s"
    )
    return tokenizers.load("sentencepiece:" + file)
  tokenizer = tokenizers.load(cfg.tokenizer)
  tokenizer.save(directory)
  return tokenizer


def _text(document: Document, cfg: Any) -> str:
  if not isinstance(document.content, str):
    raise DataError(
      f"{document.where}: holds token ids, which train no SentencePiece model (data.tokenizer = "
      f"{cfg.tokenizer!r}); name the tokenizer they come from, such as 'gpt2'"
    )
  return document.content


def _divert(
  stream: Iterable[Tokenized], validation: shards.ShardWriter, separator: dict[str, Any]
) -> Iterator[Tokenized]:
  """Training documents pass; validation documents are written on the way."""
  for item in stream:
    if item.split == "train":
      yield item
    else:
      validation.append(separated(item.ids, separator), item.num_bytes)


# ---- training documents
# -------------------------------------------------------------------------------------------------


def _write_shuffled(
  stream: Iterable[Tokenized],
  directory: str,
  writer: shards.ShardWriter,
  separator: dict[str, Any],
  seed: int,
  buckets: int,
) -> dict[str, Any]:
  """A uniform shuffle in bounded memory: documents go to random buckets on disk, and each bucket is
  permuted in memory."""
  folder = os.path.join(directory, "shuffle")
  os.makedirs(folder)
  paths = [
    [os.path.join(folder, f"{bucket}.{part}") for part in ("ids", "sizes")]
    for bucket in range(buckets)
  ]
  with contextlib.ExitStack() as stack:
    files = [[stack.enter_context(open(path, "wb")) for path in pair] for pair in paths]
    scatter = np.random.default_rng([seed, 0])
    for item in stream:
      ids, sizes = files[scatter.integers(buckets)]
      tokens = separated(item.ids, separator).astype(np.uint32)
      ids.write(tokens.tobytes())
      sizes.write(np.array([len(tokens), item.num_bytes], np.int64).tobytes())
  for bucket, (ids_path, sizes_path) in enumerate(paths):
    ids, sizes = np.fromfile(ids_path, np.uint32), np.fromfile(sizes_path, np.int64).reshape(-1, 2)
    ends = np.cumsum(sizes[:, 0])
    for i in np.random.default_rng([seed, 1, bucket]).permutation(len(sizes)):
      writer.append(ids[ends[i] - sizes[i, 0] : ends[i]], int(sizes[i, 1]))
  shutil.rmtree(folder)
  return writer.close()


def _write_records(
  stream: Iterable[Tokenized], directory: str, separator: dict[str, Any], dtype: np.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The training documents' ids as TFDS ArrayRecord; separators are added in reading, as they are
  to a user's own records."""
  from beyond_outliers.data import tfds  # imports TFDS, which token shards don't need

  counts = {"documents": 0, "tokens": 0, "bytes": 0}

  def counted() -> Iterator[np.ndarray]:
    for item in stream:
      counts["documents"] += 1
      counts["tokens"] += len(separated(item.ids, separator))
      counts["bytes"] += item.num_bytes
      yield item.ids

  path = tfds.write(counted(), os.path.join(directory, "records"), dtype.newbyteorder("=").type)
  records = {
    "path": "{directory}/" + os.path.relpath(path, directory),
    "field": "tokens",
    "count": counts["documents"],
    "held_out": 0.0,
  }
  return {**counts, "shards": None}, records


class _InPlace:
  """A TFDS dataset that is trained on where it lies: only its validation documents are copied."""

  def __init__(self, cfg: Any):
    from beyond_outliers.data import tfds

    self._cfg = cfg
    self._rule, _, self._argument = cfg.validation.partition(":")
    self._held_out = float(self._argument) if self._rule == "fraction" else 0.0
    self._records = tfds.Records(cfg.path, cfg.field)
    newest = int(self._argument) if self._rule == "newest" else 0
    self._count = max(
      0, len(self._records) - newest
    )  # records to train on; under "fraction" some of them are passed over

  def validation(self) -> Iterator[tuple[str, Document]]:
    """Only under the rule "fraction" does this read every document."""
    if self._rule == "newest":
      return (
        ("validation", document)
        for document in self._records.read(range(self._count, len(self._records)))
      )
    if self._rule == "path":  # whose validation documents come first
      return itertools.takewhile(lambda item: item[0] == "validation", documents.split(self._cfg))
    return (item for item in documents.split(self._cfg) if item[0] == "validation")

  def sample(self, max_bytes: int) -> Iterator[Document]:
    """As `documents.training_sample`, without reading what lies between."""
    step = documents.sample_step(self._cfg, max_bytes)
    for document in self._records.read(range(0, self._count, step)):
      if not documents.is_held_out(document.content, self._held_out):
        yield document

  def training(self) -> tuple[dict[str, Any], dict[str, Any]]:
    if not self._count:
      raise _empty(self._cfg, "train")
    records = {
      "path": os.path.abspath(self._cfg.path),
      "field": self._cfg.field,
      "count": self._count,
      "held_out": self._held_out,
    }
    return {
      "documents": None if self._held_out else self._count,
      "tokens": None,
      "bytes": None,
      "shards": None,
    }, records
