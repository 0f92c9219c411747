"""Contender of bench/peers.py: a tokenizer's library alone, encoding JSON lines.

It only counts tokens, and keeps, checks and writes nothing."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from beyond_outliers.bench.contenders import serve

AT_ONCE = 64  # documents


def texts(file: str) -> Iterator[list[str]]:
  with open(file) as lines:
    found = (json.loads(line)["text"] for line in lines)
    while batch := list(itertools.islice(found, AT_ONCE)):
      yield batch


def counter(tokenizer: str) -> Callable[[list[str]], int]:
  """A function from texts to their number of tokens, with as many threads as there are cores."""
  kind, file = tokenizer.split(":", 1)
  if kind == "sentencepiece":
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    return lambda batch: sum(map(len, pieces.encode(batch, return_type="numpy", num_threads=-1)))
  import tokenizers

  model: Any = tokenizers.Tokenizer.from_file(file)
  return lambda batch: sum(map(len, model.encode_batch_fast(batch)))


def main(documents: str, tokenizer: str) -> None:
  # A new tokenizer each time, as in ours: one that has read these texts would have cached words.
  serve(lambda: sum(map(counter(tokenizer), texts(documents))))


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
