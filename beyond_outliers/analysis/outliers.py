"""Outliers of activations and weights as tables: the metrics of arXiv 2509.23500, a row a
tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import pandas as pd

from beyond_outliers.evaluate.activations import (
  ACTIVATIONS,
  METRICS,
  OUTLIER,
  WEIGHTS,
  Moments,
  collect,
  kurtosis,
  max_to_mean,
  max_to_median,
  measurement,
  on_documents,
  outlier_channels,
  pooled,
  rms_kurtosis,
  sqnr,
  statistics,
  summary,
  weight_measurement,
)
from beyond_outliers.model import transformer
from beyond_outliers.quant import QuantSpec

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
  model: transformer.Transformer,
  params: Any,
  batches: Iterable[Mapping[str, Any]],
  spec: QuantSpec = ACTIVATIONS,
  *,
  mask_documents: bool = False,
) -> pd.DataFrame:
  """The input of every linear layer and the residual stream over all batches; see `collect`. Memory
  does not grow with them.

  batches: as runs.Run.batches("validation") gives them. spec: what sqnr is under, along the
    features."""
  step = jax.jit(measurement(model, spec, mask_documents))
  return collect(step(params, batch) for batch in batches)


def weights(params: Any, spec: QuantSpec = WEIGHTS) -> pd.DataFrame:
  """Every matrix, in rows like those of `measure`; `tokens` counts its output channels."""
  return collect([jax.jit(weight_measurement, static_argnums=1)(params, spec)]).assign(
    kind="weights"
  )
