"""Preparation: documents -> tokens -> a dataset folder, made once and opened ever after.

The folder's name carries a fingerprint of every setting that shapes its contents. It is filled
under another name and renamed when complete, behind a lock, so that a killed preparation leaves
nothing that could be taken for data and two that race do the work once.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from beyond_outliers import config
from beyond_outliers.data import shards, shuffle, splits, tokenizer_training, tokenizers
from beyond_outliers.data.encoding import Separator, Tokenized, separated, tokenized
from beyond_outliers.errors import DataError
from beyond_outliers.types import Json

if TYPE_CHECKING:
  from beyond_outliers.data.in_place import InPlace  # imports TFDS, which token shards don't need

_Log = Callable[[str], None]

# Settings that shape a dataset's contents, and so are hashed into its name.
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


def prepare(cfg: config.Data, *, log: _Log = print) -> shards.Dataset:
  """Opens the dataset of the data section, preparing it first if need be. Errors: DataError."""
  directory = dataset_directory(cfg)
  if not os.path.isdir(directory):
    _make_folder(cfg.directory, directory)
    with _lock(directory, log):
      if not os.path.isdir(directory):
        _make(cfg, directory, log)
  dataset = shards.open_dataset(directory)
  _check(dataset, cfg, log)
  return dataset


def _make_folder(parent: str, directory: str) -> None:
  """The folder that a dataset goes into. Errors: DataError, before any document is read."""
  try:
    os.makedirs(parent, exist_ok=True)
    tempfile.TemporaryFile(dir=parent).close()
    if os.path.isfile(directory) or os.path.isdir(directory + ".lock"):
      raise FileExistsError(f"{directory} or its .lock is in the way")
  except OSError as error:
    reason = error.strerror or str(error)
    raise DataError(
      f"data.directory = {parent!r}: {reason}; give a folder to write datasets into"
    ) from None


def dataset_directory(cfg: config.Data) -> str:
  """The folder that `prepare` makes, or opens."""
  settings = {name: getattr(cfg, name) for name in SHAPING}
  kind = cfg.tokenizer.partition(":")[0]
  if cfg.tokenizer == "sentencepiece":
    # The model trained here has exactly this size; other tokenizers bring their own.
    settings["vocab"] = cfg.vocab
    kind += str(cfg.vocab)
  fingerprint = hashlib.sha256(
    json.dumps([shards.FORMAT, settings], sort_keys=True).encode()
  ).hexdigest()
  return os.path.join(cfg.directory, f"{cfg.source}-{kind}-{fingerprint[:10]}")


@contextlib.contextmanager
def _lock(directory: str, log: _Log) -> Iterator[None]:
  """Lock held by one process at a time; the kernel releases it when the process ends."""
  with open(directory + ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f"prepare: another process prepares {directory}; waiting")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _make(cfg: config.Data, directory: str, log: _Log) -> None:
  here = f"{directory}.partial-{socket.gethostname()}-"
  for leftover in glob.glob(glob.escape(here) + "*"):  # of preparations that were killed
    shutil.rmtree(leftover)
  partial = here + str(os.getpid())
  os.makedirs(partial)
  try:
    shards.write_meta(partial, _fill(cfg, partial, log))
    # Else a host that our lock does not reach was first: its work is as good.
    if not os.path.isdir(directory):
      os.rename(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _check(dataset: shards.Dataset, cfg: config.Data, log: _Log) -> None:
  """Refuses a dataset that the configuration or the source files have moved away from."""
  tokenizer = dataset.tokenizer
  _check_vocab(tokenizer, cfg)
  file = cfg.tokenizer.partition(":")[2]
  if file and not os.path.exists(file):  # as below, of the source
    log(f"prepare: using {dataset.directory}; its tokenizer {file} is not here to compare with")
  elif (
    cfg.tokenizer != "sentencepiece"
    and (configured := tokenizers.load(cfg.tokenizer).fingerprint) != tokenizer.fingerprint
  ):
    raise DataError(
      f"data.tokenizer = {cfg.tokenizer!r}: now has fingerprint {configured[:12]}, "
      f"{dataset.directory} was made with {tokenizer.fingerprint[:12]}; restore the tokenizer's "
      "file, or delete the folder to prepare again"
    )
  try:
    found = _describe(splits.input_files(cfg))
  except DataError as error:  # prepared data outlive their source
    log(f"prepare: using {dataset.directory}; its source is not here to compare with ({error})")
    return
  made_from = dataset.meta["inputs"]
  if found != made_from:
    raise DataError(
      f"data.path = {cfg.path!r}: the files differ from those that {dataset.directory} was made "
      f"from ({found['files']} files of {found['bytes']} bytes now, {made_from['files']} of "
      f"{made_from['bytes']} then); restore them, or delete the folder to prepare again"
    )


def _check_vocab(tokenizer: tokenizers.Tokenizer, cfg: config.Data) -> None:
  if tokenizer.vocab_size > cfg.vocab:
    raise DataError(
      f"data.vocab = {cfg.vocab}: the tokenizer {cfg.tokenizer!r} has {tokenizer.vocab_size} "
      "tokens; raise data.vocab to at least that"
    )


def _describe(files: dict[str, int]) -> Json:
  listing = json.dumps([[os.path.basename(name), size] for name, size in files.items()])
  return {
    "files": len(files),
    "bytes": sum(files.values()),
    "sha256": hashlib.sha256(listing.encode()).hexdigest(),
  }


def _fill(cfg: config.Data, directory: str, log: _Log) -> Json:
  """Writes everything but meta.json, and returns that."""
  inputs = splits.input_files(cfg)
  log(
    f"prepare: {cfg.source} ({len(inputs)} files, {sum(inputs.values()) / 1e6:.1f} MB) -> "
    f"{dataset_directory(cfg)}"
  )
  in_place = _in_place(cfg)
  tokenizer = _tokenizer(cfg, in_place, directory, log)
  _check_vocab(tokenizer, cfg)
  separator = _separator(tokenizer, cfg)
  dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
  validation = shards.ShardWriter(directory, "validation", dtype, cfg.shard_tokens)
  labeled = in_place.validation() if in_place else splits.split_documents(cfg)
  training = _divert(tokenized(labeled, tokenizer, log), validation, separator)
  first = next(training, None)  # which writes the validation documents before it
  if in_place:
    train, records = in_place.training()
  elif first is None:
    raise splits.empty_split(cfg, "train")
  else:
    write = _write_records if cfg.reader == "tfds" else _write_shards
    train, records = write(itertools.chain([first], training), cfg, directory, separator, dtype)
  counts = {"train": train, "validation": validation.close()}
  if not validation.documents:
    raise splits.empty_split(cfg, "validation")
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
    "splits": counts,
    "records": records,
  }


def _in_place(cfg: config.Data) -> InPlace | None:
  """The dataset that training documents stay in, if they do."""
  if not cfg.reader == cfg.source == "tfds":
    return None
  from beyond_outliers.data.in_place import InPlace

  return InPlace(cfg)


def _separator(tokenizer: tokenizers.Tokenizer, cfg: config.Data) -> Separator:
  token = {"eot": tokenizer.eot, "bos": tokenizer.bos}[cfg.separator]
  if token is None:
    raise DataError(
      f"data.separator = {cfg.separator!r}: the tokenizer {cfg.tokenizer!r} has no such token; "
      "expected the other of 'eot', 'bos', or another tokenizer"
    )
  return {"name": cfg.separator, "id": token}


def _tokenizer(
  cfg: config.Data, in_place: InPlace | None, directory: str, log: _Log
) -> tokenizers.Tokenizer:
  """The configured tokenizer, trained if need be; a copy goes to the dataset's folder."""
  if cfg.tokenizer != "sentencepiece":
    tokenizer = tokenizers.load(cfg.tokenizer)
    tokenizer.save(directory)
    return tokenizer
  size = tokenizer_training.SAMPLE_BYTES
  sample = in_place.training_sample(size) if in_place else splits.training_sample(cfg, size)
  return tokenizer_training.trained_tokenizer(sample, cfg, directory, log)


def _divert(
  stream: Iterable[Tokenized], validation: shards.ShardWriter, separator: Separator
) -> Iterator[Tokenized]:
  """Training documents pass; validation documents are written on the way."""
  for item in stream:
    if item.split == "train":
      yield item
    else:
      validation.append(separated(item.ids, separator), item.num_bytes)


def _write_shards(
  stream: Iterable[Tokenized],
  cfg: config.Data,
  directory: str,
  separator: Separator,
  dtype: np.dtype,
) -> tuple[Json, None]:
  """The training documents as token shards, shuffled."""
  writer = shards.ShardWriter(directory, "train", dtype, cfg.shard_tokens)
  documents = ((separated(item.ids, separator), item.num_bytes) for item in stream)
  buckets = shuffle.num_buckets(sum(splits.input_files(cfg).values()))
  folder = os.path.join(directory, "shuffle")
  for ids, num_bytes in shuffle.shuffled(documents, folder, cfg.seed, buckets):
    writer.append(ids, num_bytes)
  return writer.close(), None


def _write_records(
  stream: Iterable[Tokenized],
  cfg: config.Data,
  directory: str,
  separator: Separator,
  dtype: np.dtype,
) -> tuple[Json, Json]:
  """The training documents' ids as TFDS ArrayRecord; separators are added in reading, as they are
  to a user's own records."""
  from beyond_outliers.data import tfds

  del cfg
  counts = {"documents": 0, "tokens": 0, "bytes": 0}

  def counted() -> Iterator[np.ndarray]:
    for item in stream:
      counts["documents"] += 1
      counts["tokens"] += len(separated(item.ids, separator))
      counts["bytes"] += item.num_bytes
      yield item.ids

  path = tfds.write_documents(
    counted(), os.path.join(directory, "records"), dtype.newbyteorder("=").type
  )
  records = {
    "path": "{directory}/" + os.path.relpath(path, directory),
    "field": "tokens",
    "count": counts["documents"],
    "held_out": 0.0,
  }
  return {**counts, "shards": None}, records
