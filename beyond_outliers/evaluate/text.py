"""Validation text of an evaluation job: a run's own, or another dataset's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TypedDict

from beyond_outliers import config, data, runs
from beyond_outliers.config.checks import require
from beyond_outliers.data import tokenizers
from beyond_outliers.evaluate import results
from beyond_outliers.types import Json

LONGER = 16  # times the training context, at most: beyond that, neither model nor memory copes


@dataclasses.dataclass(frozen=True)
class Text:
  """Validation documents, how they are cut into batches of windows, and how texts begin."""

  dataset: data.Dataset
  section: config.Data
  context: int
  batch_size: int
  documents: int  # of the validation split; 0: all
  prefix: int  # token put before a text without context, as between training documents
  bos: bool  # whether it is put before every text, as before every training document


class TextOptions(TypedDict, total=False):
  """Options that override a target's own text."""

  dataset: str  # folder of a prepared dataset; "": the target's own
  context: int  # tokens per window; 0: the target's own
  batch_size: int  # windows at once; 0: the target's own
  documents: int | None  # of the validation split, 0: all; None: the target's own


def text_of_run(
  run: runs.Run,
  *,
  dataset: str = "",
  context: int = 0,
  batch_size: int = 0,
  documents: int | None = None,
) -> Text:
  """The run's own validation documents, or those of another dataset with the same tokenizer. Warns
  if they are separated by another token than the training documents.

  Errors: ConfigError, DataError."""
  c, trained_on = run.config, run.trained_on
  opened = data.open(dataset) if dataset else run.dataset
  require(
    opened.tokenizer.fingerprint == trained_on["tokenizer"],
    "--data",
    opened.directory,
    f"its tokenizer is {opened.tokenizer.fingerprint[:12]}, and the run was trained with "
    f"{trained_on['tokenizer'][:12]}; prepare the documents with the run's tokenizer",
  )
  parted = opened.meta["separator"]["name"], opened.meta["settings"].get("eot", "")
  if parted != (c.data.separator, c.data.eot):
    given, own = (
      " ".join([f"separator={separator}", *([f"eot={eot}"] if eot else [])])
      for separator, eot in (parted, (c.data.separator, c.data.eot))
    )
    results.warn(
      f"--data = {opened.directory!r}: its documents are separated by another token ({given}) than "
      f"those that the run was trained on ({own}), and their losses cannot be compared; prepare "
      "them with the run's data.separator and data.eot"
    )
  remedy = (
    f"the run was trained on windows of {c.context} tokens; give at most {LONGER * c.context}"
  )
  require(context <= LONGER * c.context, "--context", context, remedy)
  return Text(
    opened,
    dataclasses.replace(c.data, reader=_reader_of(opened)),
    context or c.context,
    batch_size or c.eval.batch_size,
    c.eval.documents if documents is None else documents,
    # As in training, whatever is evaluated: --data may name documents with another separator.
    prefix=getattr(opened.tokenizer, c.data.separator),
    bos=c.data.separator == "bos",
  )


def dataset_for(
  directory: str, dataset: str, warn: Callable[[str], None]
) -> tuple[data.Dataset, int | None]:
  """(dataset, token that the directory's tokenizer puts before a text, if any).

  warn: receives a line if the directory has no tokenizer to compare with the dataset's."""
  own = tokenizers.own_of(directory)
  remedy = f"data.tokenizer={own or f'huggingface:{directory}/tokenizer.json'}"
  require(
    bool(dataset),
    "--data",
    dataset,
    f"give the folder of documents that python -m beyond_outliers.prepare made with {remedy}",
  )
  opened = data.open(dataset)
  if not own:
    # A model with as many tokens would get a loss, though its ids might mean other tokens.
    warn(
      f"{directory}: no tokenizer.json, tokenizer.model, or vocab.json with merges.txt: the "
      f"tokenizer of {dataset} was used, which may not be the model's"
    )
    return opened, None
  expected, found = tokenizers.fingerprint(own), opened.tokenizer.fingerprint
  require(
    found == expected,
    "--data",
    dataset,
    f"its tokenizer is {found[:12]}, and the model's {expected[:12]}; prepare the documents with "
    f"{remedy}",
  )
  return opened, tokenizers.added_bos(directory)


def section_of(dataset: data.Dataset, vocab: int) -> config.Data:
  """The data section for a model that no run describes."""
  settings: Json = {
    **dataset.meta["settings"],
    "reader": _reader_of(dataset),
    "directory": os.path.dirname(dataset.directory),
    "vocab": vocab,
    "mask_documents": False,
    "readers": 8,
    "prefetch": 4,
  }
  return config.Data(**settings)


def _reader_of(dataset: data.Dataset) -> str:
  return "shards" if dataset.meta["records"] is None else "tfds"
