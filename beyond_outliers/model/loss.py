"""Losses: cross entropy over a large vocabulary, and the divergence between two predictions.

Legend: B batch, L length, T = B·L tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from beyond_outliers.model import stack
from beyond_outliers.model.forward import Forward
from beyond_outliers.types import Batch, Params


@jax.custom_vjp
def cross_entropy(logits_TxV, targets_T):
  """Negative log-likelihood in nats, [T], of integer targets, in float32 or wider.

  Keeps the logits and one value per token for the backward pass, which computes the logits'
  gradient in one sweep: half the memory of differentiating log-softmax, at the same speed."""
  return _forward(logits_TxV, targets_T)[0]


def _forward(logits_TxV, targets_T):
  wide_TxV = logits_TxV.astype(jnp.promote_types(logits_TxV.dtype, jnp.float32))
  top_T = jnp.max(wide_TxV, axis=-1)
  log_denominator_T = top_T + jnp.log(jnp.sum(jnp.exp(wide_TxV - top_T[:, None]), axis=-1))
  target_T = jnp.take_along_axis(wide_TxV, targets_T[:, None], axis=-1)[:, 0]
  return log_denominator_T - target_T, (logits_TxV, targets_T, log_denominator_T)


def _backward(residuals, g_T):
  logits_TxV, targets_T, log_denominator_T = residuals
  probabilities_TxV = jnp.exp(logits_TxV.astype(g_T.dtype) - log_denominator_T[:, None])
  is_target_TxV = (
    jax.lax.broadcasted_iota(targets_T.dtype, logits_TxV.shape, 1) == targets_T[:, None]
  )
  return (g_T[:, None] * (probabilities_TxV - is_target_TxV)).astype(logits_TxV.dtype), None


cross_entropy.defvjp(_forward, _backward)


def divergence(p_TxV, q_TxV):
  """Kullback-Leibler divergence of softmax(q) from softmax(p), in nats, [T], float32 or wider.

  p, q: logits."""
  wide = jnp.promote_types(p_TxV.dtype, jnp.float32)
  log_p_TxV, log_q_TxV = (
    jax.nn.log_softmax(logits_TxV.astype(wide)) for logits_TxV in (p_TxV, q_TxV)
  )
  return jnp.sum(jnp.exp(log_p_TxV) * (log_p_TxV - log_q_TxV), axis=-1)


def token_losses(
  forward: Forward, params: Params, batch: Batch, rng: jax.Array | None = None
) -> jax.Array:
  """Negative log-likelihood in nats of every target, [B, L], float32 at least; padding included.

  rng: for what the model draws in training, such as stochastic rounding."""
  rngs = None if rng is None else dict.fromkeys(stack.STREAMS, rng)
  return forward(params, batch, rngs=rngs, method="losses", targets_BxL=batch["targets"])


def flat_logits(logits_BxLxV: jax.Array) -> jax.Array:
  """Logits of all tokens, reshaped to [T, V]."""
  return logits_BxLxV.reshape(-1, logits_BxLxV.shape[-1])
