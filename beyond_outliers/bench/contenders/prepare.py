"""Contender of bench/peers.py: preparing a dataset from JSON lines."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile

from beyond_outliers.bench.contenders import serve
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.data import preparation

VOCAB = 8192  # of the larger tokenizer


def main(documents: str, tokenizer: str) -> None:
  """Serves preparations of the documents. The result is the number of tokens, separators aside."""
  given = dict(source="jsonl", path=documents, tokenizer=tokenizer, vocab=VOCAB)
  c = dataclasses.replace(study_config("adamw", "nano").data, **given)

  def work() -> float:
    with tempfile.TemporaryDirectory() as folder:
      dataset = preparation.prepare(dataclasses.replace(c, directory=folder), log=_quiet)
      counts = dataset.meta["splits"].values()
      return sum(split["tokens"] - split["documents"] for split in counts)

  serve(work)


def _quiet(text: str) -> None:
  """Logs nothing, since stdout is for figures."""


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
