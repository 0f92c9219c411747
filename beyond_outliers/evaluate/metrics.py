"""Metrics of a model on batches of documents: pure numpy, for training and evaluation jobs alike.

Legend: B batch, L length, N documents, M quantities, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from beyond_outliers.types import Batch

# batch -> (negative log-likelihood of every target in nats, number of its document from 1, or 0
# where the target does not count), [B, L] numpy
TokenLosses = Callable[[Batch], tuple[np.ndarray, np.ndarray]]
# The same for several values of every target, by name.
TokenNumbers = Callable[[Batch], tuple[Mapping[str, np.ndarray], np.ndarray]]

RESAMPLES, CONFIDENCE = 10_000, 0.95
AT_ONCE = 1 << 22  # counts of drawn documents that `intervals` holds in memory


def evaluate(
  token_losses: TokenLosses, batches: Iterable[Batch], num_bytes: int | None
) -> dict[str, Any]:
  """Loss over all targets of a fixed set of documents, and its standard error over documents.

  num_bytes: UTF-8 bytes of those documents' text; None when unknown.
  Returns loss (nats per target), loss_stderr (see `ratio_and_stderr`), perplexity, bits_per_byte
  (over all counted targets, ends of documents included, per byte that they stand for: num_bytes
  less the `unscored_bytes` of `data.validation_batches`; None if unknown), documents, tokens
  (targets)."""

  def token_numbers(batch):
    nll_BxL, document_BxL = token_losses(batch)
    return {"nll": nll_BxL}, document_BxL

  sums, counts_N = by_document(token_numbers, batches)
  return _loss_metrics(sums["nll"], counts_N, scored_bytes(batches, num_bytes))


def compare(
  token_numbers: TokenNumbers, batches: Iterable[Batch], num_bytes: int | None, *, seed: int = 0
) -> dict[str, Any]:
  """Metrics of a changed model against a reference on a fixed set of documents, given `nll`,
  `reference_nll`, `kl` and `agreement` of every target.

  Returns those of `evaluate`, and means over all targets: reference_loss, loss_difference (nats),
  kl and agreement, the last three with <name>_interval, [low, high]; see `intervals`. seed: of the
  bootstrap."""
  sums, counts_N = by_document(token_numbers, batches)
  judged = {
    "loss_difference": sums["nll"] - sums["reference_nll"],
    "kl": sums["kl"],
    "agreement": sums["agreement"],
  }
  bounds_Mx2 = intervals(np.stack(list(judged.values())), counts_N, seed=seed)
  means = {"reference_loss": sums["reference_nll"], **judged}
  return {
    **_loss_metrics(sums["nll"], counts_N, scored_bytes(batches, num_bytes)),
    **{name: float(sums_N.sum() / counts_N.sum()) for name, sums_N in means.items()},
    **{
      f"{name}_interval": bounds_2.tolist()
      for name, bounds_2 in zip(judged, bounds_Mx2, strict=True)
    },
  }


def scored_bytes(batches: Iterable[Batch], num_bytes: int | None) -> int | None:
  """Bytes of text that the targets stand for: all, less the batches' `unscored_bytes` if any."""
  return num_bytes and num_bytes - getattr(batches, "unscored_bytes", 0)


def by_document(
  token_numbers: TokenNumbers, batches: Iterable[Batch]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """({name: sum over the targets of each document, [N]}, number of targets, [N]), float64, of the
  documents that have targets."""
  sums: dict[str, np.ndarray] = {}
  counts = np.zeros(1)
  for batch in batches:
    numbers, document_BxL = token_numbers(batch)
    document = document_BxL.ravel()
    size = max(counts.size, int(document.max()) + 1)
    counts = np.pad(counts, (0, size - counts.size)) + np.bincount(document, minlength=size)
    for name, x_BxL in numbers.items():
      before = sums.get(name, np.zeros(1))
      sums[name] = np.pad(before, (0, size - before.size)) + np.bincount(
        document, x_BxL.ravel().astype(np.float64), size
      )
  has_targets = counts[1:] > 0
  return {name: total[1:][has_targets] for name, total in sums.items()}, counts[1:][has_targets]


def intervals(
  sums_MxN: np.ndarray,
  counts_N: np.ndarray,
  *,
  seed: int,
  resamples: int = RESAMPLES,
  confidence: float = CONFIDENCE,
) -> np.ndarray:
  """Confidence intervals of Σ sums / Σ counts over all documents, [M, 2]: the ratio ± Student's t
  times the bootstrap's standard error.

  The bootstrap is paired: all M quantities share each draw of documents, so what makes a document
  hard cancels in differences. Percentiles of the resamples would be too narrow for few documents
  (Hesterberg, arXiv 1411.5279): their variance is 1 - 1/N of what it should be, and estimated with
  N - 1 degrees of freedom. NaN for one document, which says nothing about others."""
  from scipy import special  # a third of a second to import, and training needs no intervals

  N = counts_N.size
  if N < 2:
    return np.full((len(sums_MxN), 2), math.nan)
  draw, rows, ratios = np.random.default_rng(seed), max(1, AT_ONCE // N), []
  for start in range(0, resamples, rows):
    times_RxN = draw.multinomial(N, np.full(N, 1 / N), min(rows, resamples - start)).astype(
      np.float64
    )
    ratios.append(times_RxN @ sums_MxN.T / (times_RxN @ counts_N)[:, None])
  stderr_M = math.sqrt(N / (N - 1)) * np.concatenate(ratios).std(axis=0)
  center_M = sums_MxN.sum(axis=1) / counts_N.sum()
  width_M = special.stdtrit(N - 1, (1 + confidence) / 2) * stderr_M
  return np.stack([center_M - width_M, center_M + width_M], axis=1)


def _loss_metrics(
  sums_N: np.ndarray, counts_N: np.ndarray, num_bytes: int | None
) -> dict[str, Any]:
  loss, stderr = ratio_and_stderr(sums_N, counts_N)
  return {
    "loss": loss,
    "loss_stderr": stderr,
    "perplexity": math.exp(min(loss, 700)),
    "bits_per_byte": float(sums_N.sum()) / math.log(2) / num_bytes if num_bytes else None,
    "documents": sums_N.size,
    "tokens": int(counts_N.sum()),
  }


def ratio_and_stderr(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
  """Σ sums / Σ counts and its standard error over documents: the linearised ratio estimator.

  The documents are treated as a random sample."""
  ratio, n = sums.sum() / counts.sum(), sums.size
  residuals = sums - ratio * counts
  stderr = (
    math.sqrt(n / (n - 1) * float(residuals @ residuals)) / counts.sum() if n > 1 else math.nan
  )
  return float(ratio), float(stderr)
