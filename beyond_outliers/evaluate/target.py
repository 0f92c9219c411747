"""What an evaluation job judges: the checkpoints of a run or a Hugging Face directory, and the text
that belongs to them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from beyond_outliers import config, data, quant, runs
from beyond_outliers.config.checks import require
from beyond_outliers.data import tokenizers
from beyond_outliers.errors import ConfigError
from beyond_outliers.model import hf, transformer

ENDED = ("done", "diverged", "failed")  # what was preempted is started again, by schedulers too


@dataclasses.dataclass(frozen=True)
class Source:
  """A trained model at some steps, and the text that it is judged by."""

  name: str
  model: transformer.Transformer  # in full precision
  recipe: str  # that it was trained under, by quant.recipes.name_of
  trained_under: quant.Recipe | None  # the same with the run's rules; None if nothing was quantized
  steps: Callable[[], list[int]]  # that have a checkpoint now
  written: Callable[[int], Any]  # differs once a step's checkpoint was saved anew
  params: Callable[[int], Any]  # errors: CheckpointError, OSError
  ended: Callable[[], bool]  # whether no more steps will come
  news: Callable[
    [], tuple[str, Any]
  ]  # what became of the training, and what differs once it wrote something
  dataset: data.Dataset
  data: config.Data
  prefix: int  # token that stands before a text without context, as between training documents
  bos: bool  # whether it stands before every text, as before every training document
  context: int
  batch_size: int
  documents: int  # of the validation split; 0: all
  described: dict[str, Any]  # where it comes from, for whoever reads a result
  trained: str  # tells this training's result from every other, wherever it lies
  folder: epath.Path  # of the results
  tensorboard: epath.Path | None  # where TensorBoard is to find them, if at all


def of_run(
  workdir: Any,
  *,
  dataset: str = "",
  context: int = 0,
  batch_size: int = 0,
  documents: int | None = None,
) -> Source:
  """A run's checkpoints. What is not given is the run's own; `dataset`: folder of another prepared
  one.

  Errors: WorkdirError, DataError, ConfigError for data of another tokenizer, or that are not the
    run's any more."""
  run = runs.open(workdir)
  c, trained_on = run.config, run.manifest["data"]
  opened = data.open(dataset or trained_on["directory"])
  require(
    opened.tokenizer.fingerprint == trained_on["tokenizer"],
    "--data",
    opened.directory,
    f"its tokenizer is {opened.tokenizer.fingerprint[:12]}, and the run was trained with "
    f"{trained_on['tokenizer'][:12]}; "
    "prepare the documents with the run's tokenizer",
  )
  require(
    bool(dataset) or opened.fingerprint == trained_on["fingerprint"],
    "--data",
    opened.directory,
    f"holds data {opened.fingerprint[:12]}, and the run was trained on "
    f"{trained_on['fingerprint'][:12]}; restore them, or "
    "name these, if they are meant",
  )
  recipe = quant.recipes.from_config(c.quant)
  return Source(
    str(run.path),
    run.model.clone(dot_general_for=None),
    quant.recipes.name_of(c.quant),
    recipe if recipe.quantizes else None,
    lambda: run.steps,
    run.written,
    run.params,
    lambda: run.status["status"] in ENDED,
    lambda: _news(run),
    opened,
    dataclasses.replace(c.data, reader=_reader(opened)),
    # Of what the run was trained on, whatever it is judged on: --data may name documents that were
    # parted otherwise.
    getattr(opened.tokenizer, c.data.separator),
    c.data.separator == "bos",
    context or c.context,
    batch_size or c.eval.batch_size,
    c.eval.documents if documents is None else documents,
    {"workdir": str(run.path), "config": config.to_dict(c)},
    run.identity,
    run.path / "eval",
    # Beside the run's own events, which TensorBoard would take for the same run.
    run.path / "tensorboard" / "eval" if c.log.tensorboard else None,
  )


def of_checkpoint(directory: Any, **options: Any) -> Source:
  """One checkpoint of a run, RUN/checkpoints/N. Options and errors: as `of_run`."""
  path = epath.Path(directory).absolute()
  require(
    path.name.isdigit() and path.parent.name == "checkpoints",
    "--checkpoint",
    str(directory),
    "expected RUN/checkpoints/N in the folder of its run, whose config.json says what model it is",
  )
  source = of_run(path.parent.parent, **options)
  return dataclasses.replace(
    source, steps=lambda: [step for step in source.steps() if step == int(path.name)]
  )


def of_hugging_face(
  directory: str,
  *,
  dataset: str,
  context: int = 0,
  batch_size: int = 0,
  documents: int | None = None,
) -> Source:
  """An OLMo2 or Llama model, at step 0. By default windows of 1024, 8 at once, of all validation
  documents.

  Errors: DataError, ConfigError for what hf.load refuses, and for a dataset of another tokenizer
  than the directory's; where that holds none, the dataset's is taken for it, and puts nothing
  before a text."""
  own, bos = os.path.join(directory, "tokenizer.json"), None
  require(
    bool(dataset),
    "--data",
    dataset,
    "give the folder of documents that python -m beyond_outliers.prepare made with "
    f"data.tokenizer=huggingface:{own}",
  )
  opened = data.open(dataset)
  if os.path.exists(own):
    expected, found = (
      tokenizers.load(f"huggingface:{own}").fingerprint,
      opened.tokenizer.fingerprint,
    )
    require(
      found == expected,
      "--data",
      dataset,
      f"its tokenizer is {found[:12]}, and the model's {expected[:12]}; prepare the "
      f"documents with data.tokenizer=huggingface:{own}",
    )
    bos = tokenizers.added_bos(directory)
  try:
    model, params = hf.load(directory)
  except ValueError as error:
    raise ConfigError(f"--hf = {directory!r}: {error}") from None
  require(
    opened.tokenizer.vocab_size <= model.config.vocab,
    "--data",
    dataset,
    f"its tokenizer has "
    f"{opened.tokenizer.vocab_size} tokens, and the model {model.config.vocab}; prepare the "
    "documents with the model's",
  )
  section = config.Data(
    **dict[str, Any](
      {
        **opened.meta["settings"],
        "reader": _reader(opened),
        "directory": os.path.dirname(opened.directory),
        "vocab": model.config.vocab,
        "mask_documents": False,
        "readers": 8,
        "prefetch": 4,
      }
    )
  )
  return Source(
    directory,
    model,
    "none",
    None,
    lambda: [0],
    lambda step: None,
    lambda step: params,
    lambda: True,
    lambda: ("done", None),
    opened,
    section,
    opened.meta["separator"]["id"] if bos is None else bos,
    bos is not None,
    context or 1024,
    batch_size or 8,
    documents or 0,
    {"hf": os.path.abspath(directory), "model": dataclasses.asdict(model.config)},
    _fingerprint(model, params),
    epath.Path(directory).absolute() / "eval",
    None,
  )


def _news(run: runs.Run) -> tuple[str, Any]:
  status, metrics = run.status, run.path / "metrics.jsonl"
  told = (
    f"{status['status']} {'from' if status['status'] == 'running' else 'at'} step {status['step']}"
  )
  return f"{told}: {status['reason']}" if status[
    "reason"
  ] else told, metrics.stat().mtime if metrics.exists() else None


def _fingerprint(model: transformer.Transformer, params: Any) -> str:
  """Tells a model from another, of the same parameters too."""
  sums = hashlib.sha256(repr(model.config).encode())
  for leaf in jax.tree.leaves(params):
    sums.update(np.asarray(leaf).tobytes())
  return sums.hexdigest()


def _reader(dataset: data.Dataset) -> str:
  return "shards" if dataset.meta["records"] is None else "tfds"
