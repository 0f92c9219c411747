"""Contender of bench/peers.py: llm-compressor's GPTQ under the same grid, on the same windows.

Imports llm-compressor, transformers and torch: `--peer_python` runs it."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import datasets
import llmcompressor
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.quantization import GPTQModifier

from beyond_outliers.bench.contenders import serve
from beyond_outliers.bench.contenders.hugging_face import load, no_tokenizer


def grid() -> QuantizationScheme:
  weights = QuantizationArgs(
    num_bits=4, type="int", symmetric=True, strategy="group", group_size=128
  )
  return QuantizationScheme(targets=["Linear"], weights=weights)


def main(model: str, windows: str) -> None:
  full = load(model)
  with open(windows) as file:
    *calibration, held_out = json.load(file)
  asked = datasets.Dataset.from_dict(
    {"input_ids": calibration, "attention_mask": [[1] * len(window) for window in calibration]}
  )

  @torch.no_grad()
  def log_probabilities(model: Any) -> Any:
    return model(torch.tensor([held_out])).logits.log_softmax(-1)

  expected = log_probabilities(full)

  def work() -> float:
    quantized = copy.deepcopy(full)
    llmcompressor.oneshot(
      model=quantized,
      processor=no_tokenizer(),
      dataset=asked,
      recipe=[GPTQModifier(config_groups={"all": grid()}, ignore=["lm_head"])],
      max_seq_length=len(held_out),
      num_calibration_samples=len(calibration),
      shuffle_calibration_samples=False,
      batch_size=1,
    )
    found = log_probabilities(quantized)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()

  serve(work)


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
