"""Speed of zero-shot scoring: tokens per second, and as a share of the plain forward pass.

  python -m beyond_outliers.bench --scoring=nano [--repeats=5] [--json]

Questions are like those of multiple-choice tasks, but of random tokens: contexts of many lengths,
with four choices each. Padding does not count, and a context counts once per choice although it is
read only once, so the share may be above 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from beyond_outliers import hardware
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.evaluate import loglikelihood
from beyond_outliers.model import transformer
from beyond_outliers.types import Json

QUESTIONS, CHOICES = 64, 4


def measure_scoring(size: str, repeats: int) -> Json:
  """Tokens per second, the median ratio of alternating calls, and seconds of the first call, with
  compilation."""
  c = study_config("adamw", f"{size},model.dtype=float32")
  model, draw = transformer.Transformer(c.model), np.random.default_rng(c.seed)
  params = jax.jit(lambda: transformer.init(model, c.seed))()
  pairs = questions(draw, c.model.vocab, c.context)
  scorer = loglikelihood.Scorer(model, params, context=c.context)
  rows = max(1, scorer.batch_tokens // c.context)
  tokens_RxL = draw.integers(0, c.model.vocab, (rows, c.context)).astype(np.int32)
  forward = jax.jit(lambda params: model.apply({"params": params}, tokens_RxL))
  scored = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
  (first,) = hardware.seconds_of(lambda: scorer.score(pairs), 1)  # compiles, as does the next line
  hardware.seconds_of(lambda: forward(params), 1)
  rates = []
  for _ in range(repeats):
    (ours,), plain = (
      hardware.seconds_of(lambda: scorer.score(pairs), 1),
      hardware.seconds_of(lambda: forward(params), 2),
    )
    rates.append((scored / ours, 2 * tokens_RxL.size / sum(plain)))
  return {
    "size": size,
    "device": jax.devices()[0].device_kind,
    "pairs": len(pairs),
    "tokens": scored,
    "first_seconds": first,
    "scoring_tokens_per_second": statistics.median(ours for ours, _ in rates),
    "forward_tokens_per_second": statistics.median(plain for _, plain in rates),
    "ratio": statistics.median(ours / plain for ours, plain in rates),
  }


def questions(draw: np.random.Generator, vocab: int, context: int) -> list[loglikelihood.Pair]:
  """Contexts of 1/8 to 3/4 of a window, each with CHOICES choices of up to 1/8 of a window."""
  pairs = []
  for _ in range(QUESTIONS):
    shared = draw.integers(0, vocab, draw.integers(context // 8, 3 * context // 4)).tolist()
    pairs += [
      loglikelihood.Pair(shared, draw.integers(0, vocab, draw.integers(1, context // 8)).tolist())
      for _ in range(CHOICES)
    ]
  return pairs


def scoring_table(result: Mapping[str, Any]) -> str:
  """One line: both speeds, and their ratio."""
  r = result
  return (
    f"{r['size']} on {r['device']}: {r['pairs']} choices, {r['tokens']:,} tokens"
    f" · scoring {r['scoring_tokens_per_second']:,.0f} tokens/s,"
    f" plain forward pass {r['forward_tokens_per_second']:,.0f}"
    f" · {r['ratio']:.2f} of it · first {r['first_seconds']:.1f} s"
  )
