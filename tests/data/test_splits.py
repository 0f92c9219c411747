"""Splits: they hold out what their rules say."""

import pytest

from beyond_outliers.data import splits
from beyond_outliers.errors import DataError


def by_split(cfg):
  found = {"train": [], "validation": []}
  for split, document in splits.split_documents(cfg):
    found[split].append(document.content)
  return found["train"], found["validation"]


def test_newest_holds_out_the_last(make_config, texts):
  assert by_split(make_config(validation="newest:5")) == (texts[:-5], texts[-5:])


def test_fraction_goes_by_content(make_config, write_jsonl, texts):
  train, held = by_split(make_config(validation="fraction:0.3"))
  assert 5 < len(held) < 30 and sorted(train + held) == sorted(texts)
  backwards = by_split(
    make_config(validation="fraction:0.3", path=write_jsonl(texts[::-1], "reversed.jsonl"))
  )
  assert backwards == (train[::-1], held[::-1])


def test_path_takes_other_files(make_config, write_jsonl, texts):
  cfg = make_config(validation="path:" + write_jsonl(["held out"], "validation.jsonl"))
  assert by_split(cfg) == (texts, ["held out"])
  with pytest.raises(DataError, match="a file trains or validates, not both"):
    by_split(make_config(validation="path:" + cfg.path))


def test_training_sample_is_spread_over_the_training_documents(make_config, texts):
  cfg = make_config()
  size = sum(splits.input_files(cfg).values())
  assert [d.content for d in splits.training_sample(cfg, size + 1)] == texts[:-5]
  assert [d.content for d in splits.training_sample(cfg, size // 3)] == texts[:-5:4]
