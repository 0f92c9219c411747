"""Evaluation steps, (parameters, batch) -> values of every target: pure functions, for jit.

Legend: B batch, L length, T = B·L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from beyond_outliers.model import loss
from beyond_outliers.model.forward import Forward
from beyond_outliers.types import Batch, Params

EvalStep = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
PairStep = Callable[[Params, Params, Batch], tuple[dict[str, jax.Array], jax.Array]]


def make_eval_step(forward: Forward) -> EvalStep:
  """eval_step(params, batch) -> (negative log-likelihood of every target in nats, its segment).

  Both [B, L]; segment 0: the target does not count."""

  def eval_step(params: Params, batch: Batch):
    counts = batch["weights"] > 0
    nll_BxL = loss.token_losses(forward, params, batch)
    return jnp.where(counts, nll_BxL, 0), jnp.where(counts, batch["segment_ids"], 0)

  return eval_step


def make_pair_step(forward: Forward, other_forward: Forward) -> PairStep:
  """pair_step(params, other's params, batch) -> (values of every target, its segment), all [B, L].

  Segment 0: the target does not count.

  The values: `reference_nll` of the model and `nll` of the other, in nats; `kl` (nats), the
  divergence of the other's prediction from the model's; `agreement`, 1 where both find the same
  token likeliest, and NaN where some logit is NaN."""

  def pair_step(params: Params, other_params: Params, batch: Batch):
    counts, shape = batch["weights"] > 0, batch["targets"].shape
    p_TxV = loss.flat_logits(forward(params, batch))
    q_TxV = loss.flat_logits(other_forward(other_params, batch))
    targets_T = batch["targets"].reshape(-1)
    numbers = {
      "reference_nll": loss.cross_entropy(p_TxV, targets_T),
      "nll": loss.cross_entropy(q_TxV, targets_T),
      "kl": loss.divergence(p_TxV, q_TxV),
      "agreement": _agreement(p_TxV, q_TxV),
    }
    return (
      {name: jnp.where(counts, x_T.reshape(shape), 0) for name, x_T in numbers.items()},
      jnp.where(counts, batch["segment_ids"], 0),
    )

  return pair_step


def _agreement(p_TxV: jax.Array, q_TxV: jax.Array) -> jax.Array:
  # argmax takes the first NaN for the largest, so two broken models would agree.
  broken_T = (jnp.isnan(p_TxV) | jnp.isnan(q_TxV)).any(axis=-1)
  return jnp.where(broken_T, jnp.nan, jnp.argmax(p_TxV, axis=-1) == jnp.argmax(q_TxV, axis=-1))
