"""A small corpus of uneven documents, and the data section that reads it."""

import dataclasses
import json

import pytest
from corpus import make_texts

from beyond_outliers import config


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
