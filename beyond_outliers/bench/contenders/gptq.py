"""Contender of bench/peers.py: GPTQ of a model's linear layers to four bits in groups of 128."""

from __future__ import annotations

import functools
import json
import sys

import jax
import numpy as np
import optax

from beyond_outliers import quant
from beyond_outliers.bench.contenders import serve
from beyond_outliers.model import hf

RECIPE = "int4_w4a16_g128"


def main(model: str, windows: str) -> None:
  """Serves quantized models, calibrated on all windows but the last. The result is the
  Kullback–Leibler divergence on the last one, in nats."""
  full, params = hf.load(model)
  with open(windows) as file:
    *calibration, held_out = ({"tokens": np.array([window])} for window in json.load(file))

  @functools.partial(jax.jit, static_argnums=0)
  def log_probabilities(model, params):
    return jax.nn.log_softmax(model.apply({"params": params}, held_out["tokens"]))

  expected = log_probabilities(full, params)

  def work() -> float:
    q = quant.ptq.quantize(full, params, quant.RECIPES[RECIPE], "gptq", calibration)
    found = log_probabilities(q.model, q.params)
    return float(optax.losses.kl_divergence_with_log_targets(found, expected).mean())

  serve(work)


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
