"""Validation text of a model that no run describes: by which tokenizer it was made."""

import pytest

from beyond_outliers import config, data
from beyond_outliers.evaluate import text


@pytest.fixture(scope="module")
def datasets(tiny_config):
  pieces = {"data.tokenizer": "sentencepiece", "data.vocab": 300}
  return [
    data.prepare(tiny_config(**changes).data, log=lambda text: None) for changes in ({}, pieces)
  ]


def test_a_dataset_of_another_tokenizer_is_refused(datasets, tmp_path):
  """Whatever the files are called that a directory keeps its own in."""
  of_bytes, of_pieces = datasets
  of_pieces.tokenizer.save(str(tmp_path))
  with pytest.raises(config.ConfigError, match=r"--data = .*: its tokenizer is .*, and the mo"):
    text.dataset_for(str(tmp_path), of_bytes.directory, pytest.fail)
  (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
  opened, bos = text.dataset_for(str(tmp_path), of_pieces.directory, pytest.fail)
  assert bos == opened.tokenizer.bos is not None

  (tmp_path / "tokenizer.model").unlink()
  (tmp_path / "vocab.json").write_text('{"a": 0}')
  (tmp_path / "merges.txt").write_text("")
  with pytest.raises(config.ConfigError, match=rf"prepare .* data.tokenizer=gpt2:{tmp_path}$"):
    text.dataset_for(str(tmp_path), of_bytes.directory, pytest.fail)


def test_a_tokenizer_that_nobody_could_compare_is_told(datasets, tmp_path):
  told = []
  opened, bos = text.dataset_for(str(tmp_path), datasets[0].directory, told.append)
  assert opened.tokenizer.vocab_size == 258 and bos is None
  assert len(told) == 1 and told[0].startswith(f"{tmp_path}: no tokenizer.json, tokenizer.model")
  assert told[0].endswith("was used, which may not be the model's")
