"""Causal grouped-query attention. Rows of IMPLEMENTATIONS are interchangeable.

B batch, L length, H query heads, K key/value heads, G = H / K query heads a key head, Dh head width, M key length
"""

import jax
import jax.numpy as jnp


def plain(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL):
  """The readable reference: the whole matrix of scores at once."""
  B, L, H, Dh = q_BxLxHxDh.shape
  K = k_BxLxKxDh.shape[2]
  exact = jnp.promote_types(q_BxLxHxDh.dtype, jnp.float32)
  q_BxLxKxGxDh = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
  scores_BxKxGxLxM = jnp.einsum("blkgd,bmkd->bkglm", q_BxLxKxGxDh, k_BxLxKxDh, preferred_element_type=exact)
  mask = jnp.tril(jnp.ones((L, L), bool))
  if segment_ids_BxL is not None:
    same_BxLxM = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    mask = (mask & same_BxLxM)[:, None, None]
  probs_BxKxGxLxM = jax.nn.softmax(jnp.where(mask, scores_BxKxGxLxM, -jnp.inf), axis=-1)
  probs_BxKxGxLxM = probs_BxKxGxLxM.astype(v_BxLxKxDh.dtype)
  y_BxLxKxGxDh = jnp.einsum("bkglm,bmkd->blkgd", probs_BxKxGxLxM, v_BxLxKxDh, preferred_element_type=exact)
  return y_BxLxKxGxDh.reshape(B, L, H, Dh).astype(q_BxLxHxDh.dtype)


IMPLEMENTATIONS = {"plain": plain, "blockwise": plain, "fused": plain}


def attention(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL=None, *, implementation):
  """Mixes values over the past. q carries the scale of the logits; tokens see only their own segment."""
  return IMPLEMENTATIONS[implementation](q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL)
