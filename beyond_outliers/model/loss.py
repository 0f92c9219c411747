"""Cross entropy over a large vocabulary.

T tokens, V vocabulary
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits_TxV, targets_T):
  """Negative log-likelihood [T] of integer targets [T], in float32 or wider."""
  logits_TxV = logits_TxV.astype(jnp.promote_types(logits_TxV.dtype, jnp.float32))
  target_T = jnp.take_along_axis(logits_TxV, targets_T[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits_TxV, axis=-1) - target_T
