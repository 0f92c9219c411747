"""Code shared by contenders on transformers. Imports that and torch: `--peer_python` runs it."""

from __future__ import annotations

import os
from typing import Any

import tokenizers
import torch
import transformers


def load(model: str) -> Any:
  """The model of a directory in float32, on as many threads as there are cores to use."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def no_tokenizer() -> Any:
  """A tokenizer for those who ask for one and get token ids."""
  none = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, ""))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=none, eos_token="")
