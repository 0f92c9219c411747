"""Code shared by contenders that use transformers. Imports it and torch: run by `--peer_python`."""

from __future__ import annotations

import os
from typing import Any

import tokenizers
import torch
import transformers


def load(model: str) -> Any:
  """The model of a directory in float32, with one thread per available core."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def no_tokenizer() -> Any:
  """An empty tokenizer, for libraries that require one although they get token ids."""
  none = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, ""))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=none, eos_token="")
