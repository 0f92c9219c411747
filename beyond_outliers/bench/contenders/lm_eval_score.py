"""Contender of bench/peers.py: lm-eval's Hugging Face model on the same questions.

Imports only lm-eval, transformers, torch and the standard library: `--peer_python` runs it."""

from __future__ import annotations

import json
import math
import sys

from lm_eval.models.huggingface import HFLM

from beyond_outliers.bench.contenders import serve
from beyond_outliers.bench.contenders.hugging_face import load, no_tokenizer

BATCH = 16  # requests


def main(model: str, context: int, pairs: str) -> None:
  with open(pairs) as file:
    requests = [(("", ""), before, behind) for before, behind in json.load(file)]
  lm = HFLM(load(model), tokenizer=no_tokenizer(), batch_size=BATCH, max_length=context)
  serve(lambda: math.fsum(x for x, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)))


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
