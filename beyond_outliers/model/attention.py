"""Causal grouped-query attention. All rows of IMPLEMENTATIONS compute the same function.

Legend: B batch, L length, H query heads, K key-value heads, G = H / K query heads per key head, Dh
head width; S length of a block of queries, E number of keys up to its end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Queries form at most MAX_BLOCKS blocks of at least MIN_BLOCK (the last may be shorter): the one
# bounds the program's length, the other keeps products from becoming too small.
MAX_BLOCKS, MIN_BLOCK = 8, 128


def attention(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL=None, *, implementation):
  """Softmax attention of each token to itself and the tokens before it; only within its segment, if
  segments are given.

  segment_ids: [B, L], or [B, L, 2] for a tree of segments, as `Transformer` takes them.
  implementation: row of IMPLEMENTATIONS. q already includes the scale of the scores. Scores and
  softmax are float32 or wider, products use their operands' type, the result has q's type.
  Errors: ValueError for an implementation that is not in the table."""
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"model.attention = {implementation!r}: "
      f"expected one of {', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  return IMPLEMENTATIONS[implementation](q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL)


def plain(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL):
  """The readable reference, which computes all scores at once."""
  scores_BxKxGxLxL = scores(q_BxLxHxDh, k_BxLxKxDh, segment_ids_BxL)
  probabilities_BxKxGxLxL = jax.nn.softmax(scores_BxKxGxLxL, axis=-1).astype(v_BxLxKxDh.dtype)
  return weighted_values(probabilities_BxKxGxLxL, v_BxLxKxDh).astype(q_BxLxHxDh.dtype)


def scores(q_BxLxHxDh, k_BxLxKxDh, segment_ids_BxL=None):
  """Products of queries and keys, [B, K, G, L, L], -inf where a token may not attend."""
  B, L, H, Dh = q_BxLxHxDh.shape
  K = k_BxLxKxDh.shape[2]
  q_BxLxKxGxDh = q_BxLxHxDh.reshape(B, L, K, H // K, Dh)
  scores_BxKxGxLxL = _product("blkgd,bmkd->bkglm", q_BxLxKxGxDh, k_BxLxKxDh)
  return jnp.where(_mask(0, L, segment_ids_BxL), scores_BxKxGxLxL, -jnp.inf)


def weighted_values(probabilities_BxKxGxLxL, v_BxLxKxDh):
  """Means of the values, weighted by the softmax: [B, L, H, Dh], float32 or wider."""
  y_BxLxKxGxDh = _product("bkglm,bmkd->blkgd", probabilities_BxKxGxLxL, v_BxLxKxDh)
  B, L, K, G, Dh = y_BxLxKxGxDh.shape
  return y_BxLxKxGxDh.reshape(B, L, K * G, Dh)


@jax.custom_vjp
def blockwise(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL):
  """Attention by blocks of queries, each against the keys up to its end.

  About half the FLOPs of `plain`, with the scores of only one block in memory.

  The backward pass recomputes the probabilities from the logarithm of their denominator (arXiv
  2205.14135)."""
  return _blockwise_forward(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL)[0]


def _blockwise_forward(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL):
  q_BxKxGxLxDh = _heads_first(q_BxLxHxDh, k_BxLxKxDh.shape[2])
  k_BxKxLxDh, v_BxKxLxDh = k_BxLxKxDh.swapaxes(1, 2), v_BxLxKxDh.swapaxes(1, 2)
  outputs, log_denominators = [], []
  for start, end in _blocks(q_BxLxHxDh.shape[1]):
    scores_BxKxGxSxE = _product(
      "bkgsd,bked->bkgse", q_BxKxGxLxDh[:, :, :, start:end], k_BxKxLxDh[:, :, :end]
    )
    scores_BxKxGxSxE = jnp.where(_mask(start, end, segment_ids_BxL), scores_BxKxGxSxE, -jnp.inf)
    top_BxKxGxSx1 = jnp.max(scores_BxKxGxSxE, axis=-1, keepdims=True)
    weights_BxKxGxSxE = jnp.exp(scores_BxKxGxSxE - top_BxKxGxSx1)
    sum_BxKxGxSx1 = jnp.sum(weights_BxKxGxSxE, axis=-1, keepdims=True)
    weights_BxKxGxSxE = weights_BxKxGxSxE.astype(v_BxKxLxDh.dtype)
    outputs.append(
      _product("bkgse,bked->bkgsd", weights_BxKxGxSxE, v_BxKxLxDh[:, :, :end]) / sum_BxKxGxSx1
    )
    log_denominators.append((top_BxKxGxSx1 + jnp.log(sum_BxKxGxSx1))[..., 0])
  y_BxLxHxDh = _heads_last(jnp.concatenate(outputs, axis=3)).astype(q_BxLxHxDh.dtype)
  operands = q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL
  return y_BxLxHxDh, (operands, y_BxLxHxDh, jnp.concatenate(log_denominators, axis=3))


def _blockwise_backward(residuals, g_BxLxHxDh):
  operands, y_BxLxHxDh, log_denominator_BxKxGxL = residuals
  q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL = operands
  dtype, wide, (_, L, K, _) = q_BxLxHxDh.dtype, log_denominator_BxKxGxL.dtype, k_BxLxKxDh.shape
  q_BxKxGxLxDh, g_BxKxGxLxDh = _heads_first(q_BxLxHxDh, K), _heads_first(g_BxLxHxDh, K)
  k_BxKxLxDh, v_BxKxLxDh = k_BxLxKxDh.swapaxes(1, 2), v_BxLxKxDh.swapaxes(1, 2)
  mean_BxKxGxL = jnp.sum(g_BxKxGxLxDh.astype(wide) * _heads_first(y_BxLxHxDh, K), axis=-1)
  dq, dk_BxKxLxDh, dv_BxKxLxDh = [], jnp.zeros((), wide), jnp.zeros((), wide)
  for start, end in _blocks(L):
    q_BxKxGxSxDh, g_BxKxGxSxDh = q_BxKxGxLxDh[:, :, :, start:end], g_BxKxGxLxDh[:, :, :, start:end]
    k_BxKxExDh, v_BxKxExDh = k_BxKxLxDh[:, :, :end], v_BxKxLxDh[:, :, :end]
    scores_BxKxGxSxE = _product("bkgsd,bked->bkgse", q_BxKxGxSxDh, k_BxKxExDh)
    p_BxKxGxSxE = jnp.exp(scores_BxKxGxSxE - log_denominator_BxKxGxL[..., start:end, None])
    p_BxKxGxSxE = jnp.where(_mask(start, end, segment_ids_BxL), p_BxKxGxSxE, 0)
    dp_BxKxGxSxE = _product("bkgsd,bked->bkgse", g_BxKxGxSxDh, v_BxKxExDh)
    dscores_BxKxGxSxE = p_BxKxGxSxE * (dp_BxKxGxSxE - mean_BxKxGxL[..., start:end, None])
    dscores_BxKxGxSxE = dscores_BxKxGxSxE.astype(dtype)
    dq.append(_product("bkgse,bked->bkgsd", dscores_BxKxGxSxE, k_BxKxExDh))
    dk_BxKxExDh = _product("bkgse,bkgsd->bked", dscores_BxKxGxSxE, q_BxKxGxSxDh)
    dv_BxKxExDh = _product("bkgse,bkgsd->bked", p_BxKxGxSxE.astype(dtype), g_BxKxGxSxDh)
    later = ((0, 0), (0, 0), (0, L - end), (0, 0))
    dk_BxKxLxDh = dk_BxKxLxDh + jnp.pad(dk_BxKxExDh, later)
    dv_BxKxLxDh = dv_BxKxLxDh + jnp.pad(dv_BxKxExDh, later)
  dq_BxLxHxDh = _heads_last(jnp.concatenate(dq, axis=3)).astype(dtype)
  dk_BxLxKxDh, dv_BxLxKxDh = dk_BxKxLxDh.swapaxes(1, 2), dv_BxKxLxDh.swapaxes(1, 2)
  return dq_BxLxHxDh, dk_BxLxKxDh.astype(dtype), dv_BxLxKxDh.astype(dtype), None


blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def fused(q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_ids_BxL):
  """jax.nn's attention: cuDNN's kernel for 16-bit types on a GPU, otherwise by all scores at once.

  Errors: ValueError for float64, since jax.nn computes the softmax in float32."""
  if q_BxLxHxDh.dtype == jnp.float64:
    raise ValueError(
      "model.attention = 'fused' in float64: its softmax is in float32; use 'blockwise' or 'plain'"
    )
  mask = None
  if segment_ids_BxL is not None:
    mask = _of_segment(segment_ids_BxL, segment_ids_BxL)[:, None]
  kernel = "cudnn" if jax.default_backend() == "gpu" and q_BxLxHxDh.dtype.itemsize == 2 else "xla"
  # Full float32 on TPU and GPU too, whose default is less.
  with jax.default_matmul_precision("highest" if q_BxLxHxDh.dtype.itemsize >= 4 else None):
    return jax.nn.dot_product_attention(
      q_BxLxHxDh,
      k_BxLxKxDh,
      v_BxLxKxDh,
      mask=mask,
      scale=1.0,
      is_causal=True,
      implementation=kernel,
    )


IMPLEMENTATIONS = {"plain": plain, "blockwise": blockwise, "fused": fused}


def _product(axes, a, b):
  # Full float32 on TPU and GPU too, whose default is less.
  precision = jax.lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.einsum(axes, a, b, precision=precision, preferred_element_type=wide)


def _blocks(L):
  """(start, end) of each block of queries."""
  size = max(MIN_BLOCK, -(-L // MAX_BLOCKS))
  return [(start, min(start + size, L)) for start in range(0, L, size)]


def _mask(start, end, segment_ids_BxL):
  """Which of the keys 0..end the queries start..end see; broadcasts to [B, K, G, S, E]."""
  # Computed rather than a constant, which would put L² numbers into the program on every device.
  query, key = (jax.lax.broadcasted_iota(jnp.int32, (end - start, end), axis) for axis in (0, 1))
  causal_SxE = query + start >= key
  if segment_ids_BxL is None:
    return causal_SxE[None, None, None]
  same_BxSxE = _of_segment(segment_ids_BxL[:, start:end], segment_ids_BxL[:, :end])
  return (causal_SxE & same_BxSxE)[:, None, None]


def _of_segment(query_ids, key_ids):
  """Which keys belong to the queries' segments, [B, S, E]; in a tree, also to their ancestors."""
  if query_ids.ndim == 2:
    return query_ids[:, :, None] == key_ids[:, None, :]
  number_BxSx1, key_ids_Bx1xEx2 = query_ids[:, :, None, 0], key_ids[:, None]
  return (key_ids_Bx1xEx2[..., 0] <= number_BxSx1) & (number_BxSx1 <= key_ids_Bx1xEx2[..., 1])


def _heads_first(x_BxLxHxDh, K):
  B, L, H, Dh = x_BxLxHxDh.shape
  return x_BxLxHxDh.reshape(B, L, K, H // K, Dh).transpose(0, 2, 3, 1, 4)


def _heads_last(x_BxKxGxLxDh):
  B, K, G, L, Dh = x_BxKxGxLxDh.shape
  return x_BxKxGxLxDh.transpose(0, 3, 1, 2, 4).reshape(B, L, K * G, Dh)
