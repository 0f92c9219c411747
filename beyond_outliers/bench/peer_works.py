"""Rows of bench/peers.py: pieces of work, their inputs, and the contenders that do the work."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from beyond_outliers import config
from beyond_outliers.bench.contenders.prepare import VOCAB
from beyond_outliers.bench.scoring import questions
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.data import documents, preparation, tokenizer_training
from beyond_outliers.model import hf, transformer
from beyond_outliers.model.hf_config import FAMILIES
from beyond_outliers.types import Json

Inputs = Callable[[pathlib.Path], Json]


class Contender(NamedTuple):
  """One program of a row: a module of contenders/, and arguments of its own.

  elsewhere: it imports none of our dependencies, so --peer_python may run it."""

  module: str
  told: Mapping[str, Any] = {}
  elsewhere: bool = False


class Work(NamedTuple):
  """A piece of work. The first contender is ours; ratios are of its figures to the others'.

  inputs: makes what all contenders read in a folder, and returns their common arguments.
  rounds: at most this many, where a round takes long."""

  inputs: Inputs
  contenders: Mapping[str, Contender]
  rounds: int = sys.maxsize


def torch_step(recipe: str, compiled: bool) -> Contender:
  return Contender("torch_step", {"recipe": recipe, "compiled": compiled}, elsewhere=True)


PLAIN = {
  "ours": Contender("ours", {"recipe": "none"}),
  "bare JAX": Contender("bare"),
  "torch eager": torch_step("none", False),
  "torch.compile": torch_step("none", True),
}
QUEST = {
  "ours": Contender("ours", {"recipe": "quest_w4a4"}),
  "ours, plain": Contender("ours", {"recipe": "none"}),
  "torch eager": torch_step("quest_w4a4", False),
  "torch.compile": torch_step("quest_w4a4", True),
  "torch.compile, plain": torch_step("none", True),
}


def a_step(folder: pathlib.Path, *, size: str, dtype: str) -> Json:
  c = study_config("adamw", f"{size},batch_size=2,micro_batches=1")
  sizes = {"batch_size": c.batch_size, "context": c.context}
  return {"size": size, "dtype": dtype, **sizes, "model": dataclasses.asdict(c.model)}


def speeches(folder: pathlib.Path, tokenizer: str) -> Json:
  """The bundled text as JSON lines, and a tokenizer trained on it."""
  c = study_config("adamw", "nano")
  texts = [str(document.content) for document in documents.read_documents(c.data)]
  with open(folder / "documents.jsonl", "w") as lines:
    lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
  if tokenizer == "sentencepiece":
    file = folder / "tokenizer.model"
    file.write_bytes(tokenizer_training.train_sentencepiece(texts, c.data.vocab))
  else:
    import tokenizers  # the extra `hf`

    file = folder / "tokenizer.json"
    model = tokenizers.ByteLevelBPETokenizer()
    ends = ["<|endoftext|>"]  # separates documents
    model.train_from_iterator(texts, VOCAB, show_progress=False, special_tokens=ends)
    model.save(str(file))
  return {"documents": str(folder / "documents.jsonl"), "tokenizer": f"{tokenizer}:{file}"}


def llama(folder: pathlib.Path, size: str) -> config.Config:
  """Writes a Llama of one of our sizes, with random weights, as a Hugging Face directory."""
  switches = FAMILIES["llama"].switches
  c = study_config("adamw", f"{size},model.dtype=float32")
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, **switches))
  model = transformer.Transformer(c.model)
  params = jax.jit(lambda: transformer.init(model, c.seed))()
  hf.save(model, params, folder / "model", context=c.context)
  return c


def some_questions(folder: pathlib.Path) -> Json:
  c = llama(folder, "nano")
  pairs = questions(np.random.default_rng(c.seed), c.model.vocab, c.context)
  (folder / "questions.json").write_text(json.dumps(pairs))
  return {
    "model": str(folder / "model"),
    "context": c.context,
    "pairs": str(folder / "questions.json"),
  }


def calibration(folder: pathlib.Path) -> Json:
  """16 windows, 16,384 tokens, for calibration, and one more to compare the models on."""
  c = llama(folder, "50m")
  draw = np.random.default_rng(c.seed)
  windows = draw.integers(0, c.model.vocab, (17, c.context))
  (folder / "windows.json").write_text(json.dumps(windows.tolist()))
  return {"model": str(folder / "model"), "windows": str(folder / "windows.json")}


def validation_text(folder: pathlib.Path) -> Json:
  """A Llama of nano's size, and the bundled text in nano's tokenizer."""
  c = llama(folder, "nano")
  dataset = preparation.prepare(dataclasses.replace(c.data, directory=str(folder / "datasets")))
  return {"model": str(folder / "model"), "dataset": dataset.directory, "context": c.context}


ENCODING = {"ours": Contender("prepare"), "the library": Contender("raw_encoding")}

WORKS = {
  **{
    f"50m_{dtype}": Work(functools.partial(a_step, size="50m", dtype=dtype), PLAIN)
    for dtype in ("float32", "bfloat16")
  },
  **{
    f"quest_w4a4_{dtype}": Work(functools.partial(a_step, size="50m", dtype=dtype), QUEST)
    for dtype in ("float32", "bfloat16")
  },
  "prepare_huggingface": Work(functools.partial(speeches, tokenizer="huggingface"), ENCODING),
  "prepare_sentencepiece": Work(functools.partial(speeches, tokenizer="sentencepiece"), ENCODING),
  "scoring": Work(
    some_questions,
    {"ours": Contender("score"), "lm-eval": Contender("lm_eval_score", elsewhere=True)},
  ),
  "gptq": Work(
    calibration,
    {"ours": Contender("gptq"), "llm-compressor": Contender("llm_compressor", elsewhere=True)},
    rounds=3,
  ),
  "cell": Work(
    validation_text,
    {"ours": Contender("cell"), "two forwards": Contender("two_forwards")},
    rounds=4,
  ),
}
