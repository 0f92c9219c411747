"""Metrics of a model on batches of documents: pure, the same for training and for evaluation jobs."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

# batch -> (negative log-likelihood of every target in nats, number of its document from 1; 0: does not count), [B, L] numpy
TokenLosses = Callable[[Mapping[str, Any]], tuple[np.ndarray, np.ndarray]]


def evaluate(token_losses: TokenLosses, batches: Iterable[Mapping[str, np.ndarray]],
             num_bytes: int | None) -> dict[str, float | None]:
  """Loss over all targets of a fixed set of documents, and how far it would move with other documents.

  num_bytes: UTF-8 bytes of those documents' text; None when unknown.
  Returns loss (nats a target), loss_stderr (see `ratio_and_stderr`), perplexity, bits_per_byte (the nats of all
  counted targets, a document's end among them, over the bytes; None if these are unknown), documents, tokens (targets)."""
  sums, counts = np.zeros(1), np.zeros(1)
  for batch in batches:
    nll_BxL, document_BxL = token_losses(batch)
    document = document_BxL.ravel()
    size = max(sums.size, int(document.max()) + 1)
    sums = np.pad(sums, (0, size - sums.size)) + np.bincount(document, nll_BxL.ravel().astype(np.float64), size)
    counts = np.pad(counts, (0, size - counts.size)) + np.bincount(document, minlength=size)
  sums, counts = sums[1:][counts[1:] > 0], counts[1:][counts[1:] > 0]
  loss, stderr = ratio_and_stderr(sums, counts)
  return {"loss": loss, "loss_stderr": stderr, "perplexity": math.exp(min(loss, 700)),
          "bits_per_byte": float(sums.sum()) / math.log(2) / num_bytes if num_bytes else None,
          "documents": sums.size, "tokens": int(counts.sum())}


def ratio_and_stderr(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
  """Σ sums / Σ counts and its standard error when the pairs (documents) are a random sample: the linearised ratio estimator."""
  ratio, n = sums.sum() / counts.sum(), sums.size
  residuals = sums - ratio * counts
  stderr = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / counts.sum() if n > 1 else math.nan
  return float(ratio), float(stderr)
