"""Tables of outliers in activations and weights, one row per tensor, as in arXiv 2509.23500."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import pandas as pd

from beyond_outliers.evaluate.activations import (
  ACTIVATIONS,
  WEIGHTS,
  collect,
  measurement,
  on_documents,
  summary,
  weight_measurement,
)
from beyond_outliers.evaluate.outlier_metrics import (
  METRICS,
  OUTLIER,
  Moments,
  kurtosis,
  max_to_mean,
  max_to_median,
  outlier_channels,
  pooled,
  rms_kurtosis,
  sqnr,
  statistics,
)
from beyond_outliers.model.forward import make_forward
from beyond_outliers.params import check_params
from beyond_outliers.quant import QuantSpec
from beyond_outliers.quant.ptq.checks import check_tokens
from beyond_outliers.types import Batch, Params

__all__ = [
  "ACTIVATIONS",
  "METRICS",
  "OUTLIER",
  "WEIGHTS",
  "Moments",
  "collect",
  "kurtosis",
  "max_to_mean",
  "max_to_median",
  "measure",
  "measurement",
  "on_documents",
  "outlier_channels",
  "pooled",
  "rms_kurtosis",
  "sqnr",
  "statistics",
  "summary",
  "weight_measurement",
  "weights",
]


def measure(
  model: Any,
  params: Params,
  batches: Iterable[Batch],
  spec: QuantSpec = ACTIVATIONS,
  *,
  mask_documents: bool = False,
) -> pd.DataFrame:
  """Outliers in the input of every linear layer and in the residual stream, over all batches; see
  `collect`. Memory does not grow with the number of batches.

  batches: as runs.Run.batches("validation") gives them. spec: the quantization, along features,
    whose sqnr is measured.
  Errors: ConfigError for parameters of another model, tokens of another tokenizer, and no batch."""
  check_params(model, params)
  step = jax.jit(measurement(make_forward(model, mask_documents), spec))
  return collect(step(params, _known(batch, model.config.vocab)) for batch in batches)


def _known(batch: Batch, vocab: int) -> Batch:
  check_tokens(batch["tokens"], vocab, "batches")
  return batch


def weights(params: Params, spec: QuantSpec = WEIGHTS) -> pd.DataFrame:
  """Outliers in every matrix, as rows like those of `measure`; `tokens` counts output channels."""
  return collect([jax.jit(weight_measurement, static_argnums=1)(params, spec)]).assign(
    kind="weights"
  )
