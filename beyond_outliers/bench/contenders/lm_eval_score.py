"""Contender of bench/peers.py: lm-eval's model of Hugging Face directories on the same questions.

Imports lm-eval, transformers and torch, and the standard library: `--peer_python` runs it."""

from __future__ import annotations

import json
import math
import os
import sys

import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from beyond_outliers.bench.contenders import serve

BATCH = 16  # requests


def main(model: str, context: int, pairs: str) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  with open(pairs) as file:
    requests = [(("", ""), before, behind) for before, behind in json.load(file)]
  # Asked for by its constructor; the questions are token ids.
  none = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, ""))
  lm = HFLM(
    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=none, eos_token=""),
    batch_size=BATCH,
    max_length=context,
  )
  serve(lambda: math.fsum(x for x, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)))


if __name__ == "__main__":
  asked = json.loads(sys.argv[1])
  main(asked["model"], asked["context"], asked["pairs"])
