"""Forward pass of a model on a batch, with the run's choice whether attention crosses documents."""

from __future__ import annotations

from typing import Any, Protocol

from beyond_outliers.types import Batch, Params


class Forward(Protocol):
  """forward(params, batch, **options of model.apply) -> logits [B, L, V].

  With `mutable`, (logits, variables of those collections), as in flax."""

  def __call__(self, params: Params, batch: Batch, **options: Any) -> Any: ...


def make_forward(model: Any, mask_documents: bool) -> Forward:
  """The model's forward pass as a function of (params, batch), which picks the fields of the batch.

  mask_documents: a token attends only to its own document, and positions restart with each one.
  Otherwise the stream is plain causal text, as in the study (arXiv 2509.23500, section 3)."""

  def forward(params: Params, batch: Batch, **options: Any) -> Any:
    segment_ids, positions = (
      (batch["segment_ids"], batch["positions"]) if mask_documents else (None, None)
    )
    return model.apply({"params": params}, batch["tokens"], segment_ids, positions, **options)

  return forward
