"""Metrics of a target's checkpoints, as trained and quantized, on its validation text; and how
quantization error propagates through them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from beyond_outliers import data, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.evaluate import activations, metrics, propagation, steps
from beyond_outliers.evaluate.plan import SEED, WINDOWS, Cell
from beyond_outliers.evaluate.target import Target
from beyond_outliers.evaluate.text import Text
from beyond_outliers.model.forward import Forward, make_forward
from beyond_outliers.types import Batch, Json, LanguageModel, Params


class ModelMetrics:
  """Losses, outliers and errors of one target's checkpoints; programs are compiled once for all.

  mesh: splits the rows of a batch. say: receives progress."""

  def __init__(self, target: Target, mesh: jax.sharding.Mesh, say: Callable[[str], None]):
    text = target.text
    self._target, self._mesh, self._say = target, mesh, say
    index, count = mesh_lib.share_of_rows(mesh)
    self._batches = _batches(text, index, count)
    self._num_bytes = text.dataset.bytes("validation", text.documents)
    self._steps: dict[Cell, Callable[..., Any]] = {}
    self._measure_outliers: Callable[[Params, Params], dict[str, float]] | None = None

  def __call__(self, cell: Cell, params: Params, q: quant.QuantizedModel | None) -> Json:
    """Metrics of a checkpoint, for one cell.

    q: params as the cell quantizes them, if it does. For the model as it was trained, outliers are
    included, under the names by which training logs them."""
    found = self._losses(cell, params, q)
    if cell.method == "none":
      found |= self._outliers(params, q)
    return found

  def _losses(self, cell: Cell, params: Params, q: quant.QuantizedModel | None) -> Json:
    step, number = self._step(cell, q), itertools.count(1)
    trees = [params, q.params] if q else [params]
    with mesh_lib.use(self._mesh):
      placed = [mesh_lib.replicate(tree, self._mesh) for tree in trees]

      def of_batch(batch: Batch) -> Any:
        self._say(f"batch {next(number)} of {len(self._batches)}")
        rows = self._target.text.batch_size
        return jax.device_get(step(*placed, mesh_lib.put_batch(batch, self._mesh, rows)))

      if q:
        return metrics.compare(of_batch, self._batches, self._num_bytes, seed=SEED)
      return metrics.evaluate(of_batch, self._batches, self._num_bytes)

  def _step(self, cell: Cell, q: quant.QuantizedModel | None) -> Callable[..., Any]:
    if cell not in self._steps:
      # The quantized model is the same for every checkpoint: only its parameters differ.
      forward = self._forward(self._target.model)
      step = (
        steps.make_pair_step(forward, self._forward(q.model))
        if q
        else steps.make_eval_step(forward)
      )
      self._steps[cell] = jax.jit(step, out_shardings=mesh_lib.replicated(self._mesh))
    return self._steps[cell]

  def _forward(self, model: LanguageModel) -> Forward:
    return make_forward(model, self._target.text.section.mask_documents)

  def _outliers(self, params: Params, q: quant.QuantizedModel | None) -> dict[str, float]:
    self._say("outliers")
    if self._measure_outliers is None:
      forward = self._forward(q.model if q else self._target.model)
      self._measure_outliers = activations.on_documents(forward, self._batches, self._mesh)
    trees = (q.params if q else params, params)
    with mesh_lib.use(self._mesh):
      found = self._measure_outliers(*mesh_lib.replicate(trees, self._mesh))
    return {f"outliers/{name}": value for name, value in found.items()}

  def decompose_error(self, params: Params, q: quant.QuantizedModel) -> Json:
    """How error propagates through a quantized checkpoint, on the first windows of the text: the
    fields of `propagation.summary`, and `seconds`."""
    self._say("error propagation")
    began = time.perf_counter()
    mask_documents = self._target.text.section.mask_documents
    table = propagation.decompose(
      self._target.model, params, q, self._first_windows(), mask_documents=mask_documents
    )
    return {**propagation.summary(table), "seconds": time.perf_counter() - began}

  def _first_windows(self) -> Iterator[propagation.Tokens]:
    left = WINDOWS
    for batch in _batches(self._target.text):
      yield jax.tree.map(lambda x, rows=left: x[:rows], dict(batch))
      left -= len(batch["tokens"])
      if left <= 0:
        return


def _batches(text: Text, index: int = 0, count: int = 1) -> data.ValidationBatches:
  """Validation batches: one process's rows."""
  return data.validation_batches(
    text.dataset,
    text.section,
    context=text.context,
    batch_size=text.batch_size,
    documents=text.documents,
    process_index=index,
    process_count=count,
  )
