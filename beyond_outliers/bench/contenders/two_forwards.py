"""Contender of bench/peers.py: the least that a cell of an evaluation job needs, forward passes of
the model and the quantized model with their losses."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import optax

from beyond_outliers import data, quant
from beyond_outliers.bench.contenders import serve
from beyond_outliers.bench.contenders.cell import RTN
from beyond_outliers.evaluate import target


def main(model: str, dataset: str, context: int) -> None:
  found = target.HuggingFaceModel(model, dataset=dataset, context=context)
  params = found.params(0)
  q = quant.ptq.quantize(found.model, params, quant.RECIPES[RTN.recipe], RTN.method)
  text = found.text
  batches = list(
    data.validation_batches(
      text.dataset, text.section, context=text.context, batch_size=text.batch_size, documents=0
    )
  )

  def loss(model: Any, params: Any, batch: Any) -> jax.Array:
    logits = model.apply({"params": params}, batch["tokens"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (nll * batch["weights"]).sum()

  @jax.jit
  def losses(params, quantized, batch):
    return loss(found.model, params, batch), loss(q.model, quantized, batch)

  def work() -> float:
    sums = [losses(params, q.params, batch)[1] for batch in batches]
    return float(sum(sums) / sum(batch["weights"].sum() for batch in batches))

  serve(work)


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
