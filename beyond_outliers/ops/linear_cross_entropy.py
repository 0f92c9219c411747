"""Cross entropy of a linear layer's logits over a large vocabulary, computed in chunks of columns.

All logits together would be a training step's largest array, and their gradient the next; and CPUs
multiply by tens of thousands of columns at a half or a third of the speed of two thousand. Cut
Cross-Entropy (arXiv 2411.09009) computes logits twice, Liger Kernel (arXiv 2410.10989) computes
gradients along with the loss. Here the logits' exponentials are kept, in the operands' type: the
gradient, an exponential times a number per token and chunk, is rounded to that type anyway.

Legend: T tokens, D width, V vocabulary (one device's share if it is split); C columns of a chunk, N
chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from beyond_outliers.ops.int_dot import dot_codes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_cross_entropy(
  x_TxD: jax.Array,
  weights: jax.Array,
  targets_T: jax.Array,
  axis: int,
  split: Sequence[Any] = (None, None),
) -> jax.Array:
  """Negative log-likelihood in nats, [T], of integer targets under the logits x @ weights; float32
  or wider, NaN for a target outside the vocabulary.

  weights: [V, D] (axis 0) or [D, V] (axis 1). Products run in the narrower type of x and weights;
  each gets its gradient in its own type. split: the axes of the mesh, if there is one, that split
  (tokens, vocabulary)."""
  return _forward(x_TxD, weights, targets_T, axis, split, keep=False)[0]


def _forward(x_TxD, weights, targets_T, axis, split, keep=True):
  tokens, columns, chunks = _specs(axis, split)
  losses = _on_each_device(
    functools.partial(_losses, axis, keep),
    split,
    (tokens, columns, tokens),
    (tokens, chunks, chunks),
  )
  nll_T, kept_NxTxC, factor_NxTx1 = losses(x_TxD, weights, targets_T)
  known_T = (targets_T >= 0) & (targets_T < weights.shape[axis])
  nll_T = jnp.where(known_T, nll_T, jnp.nan)
  return nll_T, (x_TxD, weights, targets_T, nll_T, kept_NxTxC, factor_NxTx1)


def _backward(axis, split, residuals, g_T):
  tokens, columns, chunks = _specs(axis, split)
  gradients = _on_each_device(
    functools.partial(_gradients, axis),
    split,
    (tokens, columns, tokens, tokens, chunks, chunks, tokens),
    (tokens, columns),
  )
  return *gradients(*residuals, g_T), None


linear_cross_entropy.defvjp(_forward, _backward)


def _specs(axis, split):
  """PartitionSpecs of arrays with tokens first, of the weights, and of arrays [N, T, C]."""
  tokens, vocabulary = split
  columns = PartitionSpec(*[vocabulary if i == axis else None for i in range(2)])
  return PartitionSpec(tokens), columns, PartitionSpec(None, tokens, vocabulary)


def _on_each_device(
  function: Callable[..., Any], split: Sequence[Any], inputs: Any, outputs: Any
) -> Callable[..., Any]:
  """function(split, ...) on each device's share. It sums over the mesh once, where XLA on its own
  would do so after every chunk."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return functools.partial(function, (None, None))
  of_share = functools.partial(function, split)
  return jax.shard_map(of_share, in_specs=inputs, out_specs=outputs, check_vma=False)


def _losses(axis, keep, split, x_TxD, weights, targets_T):
  _, vocabulary = split
  dtype = _narrower(x_TxD, weights)
  count, size = _chunks(weights.shape[axis])
  targets_T = _of_this_device(targets_T, weights.shape[axis], vocabulary)
  x_TxD = x_TxD.astype(dtype)

  def of_chunk(nothing, i):
    start, chunk = _chunk(weights, axis, i)
    logits_TxC = dot_codes(x_TxD, chunk, 1, 1 - axis, dtype)
    if weights.shape[axis] % size:
      is_new_C = start + jnp.arange(size) >= i * size
      logits_TxC = jnp.where(is_new_C, logits_TxC, -jnp.inf)
    top_T = jnp.max(logits_TxC, axis=-1)
    weights_TxC = jnp.exp(logits_TxC - top_T[:, None])
    at_T = _place(targets_T, i, start, size)
    target_T = jnp.take_along_axis(logits_TxC, jnp.clip(at_T, 0, size - 1)[:, None], axis=-1)[:, 0]
    target_T = jnp.where((at_T >= 0) & (at_T < size), target_T, 0)
    kept = _stored(weights_TxC.astype(dtype)) if keep else None
    return nothing, (kept, top_T, jnp.sum(weights_TxC, axis=-1), target_T)

  _, (kept_NxTxC, top_NxT, sum_NxT, target_NxT) = lax.scan(of_chunk, None, jnp.arange(count))
  top_T = jnp.max(top_NxT, axis=0)
  top_T = top_T if vocabulary is None else lax.pmax(top_T, vocabulary)
  sum_T = _sum_over(vocabulary, jnp.sum(sum_NxT * jnp.exp(top_NxT - top_T), axis=0))
  log_denominator_T = top_T + jnp.log(sum_T)
  nll_T = log_denominator_T - _sum_over(vocabulary, jnp.sum(target_NxT, axis=0))
  return nll_T, kept_NxTxC, jnp.exp(top_NxT - log_denominator_T)[..., None]


def _gradients(axis, split, x_TxD, weights, targets_T, nll_T, kept_NxTxC, factor_NxTx1, g_T):
  tokens, vocabulary = split
  dtype = _narrower(x_TxD, weights)
  count, size = _chunks(weights.shape[axis])
  targets_T = _of_this_device(targets_T, weights.shape[axis], vocabulary)
  operand_TxD = x_TxD.astype(dtype)
  of_target_T = g_T * jnp.expm1(-nll_T)  # p - 1 from the kept p would lose p's last bits

  def of_chunk(sums, kept):
    (x_bar, weights_bar), (i, kept_TxC, factor_Tx1) = sums, kept
    start, chunk = _chunk(weights, axis, i)
    at_T = _place(targets_T, i, start, size)
    g_TxC = _restored(kept_TxC, dtype).astype(g_T.dtype) * (factor_Tx1 * g_T[:, None])
    is_target_TxC = lax.broadcasted_iota(at_T.dtype, g_TxC.shape, 1) == at_T[:, None]
    g_TxC = jnp.where(is_target_TxC, of_target_T[:, None], g_TxC).astype(dtype)
    x_bar += dot_codes(g_TxC, chunk, 1, axis, dtype)
    factors = (g_TxC, operand_TxD) if axis == 0 else (operand_TxD, g_TxC)
    chunk_bar = dot_codes(*factors, 0, 0, dtype)
    return (x_bar, lax.dynamic_update_slice_in_dim(weights_bar, chunk_bar, start, axis)), None

  zeros = tuple(jnp.zeros(x.shape, g_T.dtype) for x in (x_TxD, weights))
  # In reverse: columns that the last two chunks share are then overwritten by the earlier chunk,
  # which has them right.
  (x_bar, weights_bar), _ = lax.scan(
    of_chunk, zeros, (jnp.arange(count), kept_NxTxC, factor_NxTx1), reverse=True
  )
  x_bar, weights_bar = _sum_over(vocabulary, x_bar), _sum_over(tokens, weights_bar)
  return x_bar.astype(x_TxD.dtype), weights_bar.astype(weights.dtype)


def _narrower(a, b):
  return min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)


def widest() -> int:
  """The most columns of a chunk: on CPU as many as it multiplies at full speed; elsewhere more, to
  keep the device busy."""
  return 2048 if jax.default_backend() == "cpu" else 8192


def _chunks(width: int) -> tuple[int, int]:
  """(number of chunks, columns of each). The last one overlaps its predecessor if the columns don't
  divide evenly."""
  count = math.ceil(width / widest())
  return count, math.ceil(width / count)


def _chunk(weights, axis, i):
  """(first column, weights) of the i-th chunk."""
  _, size = _chunks(weights.shape[axis])
  start = jnp.minimum(i * size, weights.shape[axis] - size)
  return start, lax.dynamic_slice_in_dim(weights, start, size, axis)


def _place(targets_T, i, start, size):
  """Column of each target within the i-th chunk; below zero or past its end: in another chunk."""
  return jnp.where(targets_T >= i * size, targets_T - start, -1)


def _of_this_device(targets_T, width, vocabulary):
  """Targets as column numbers within this device's share."""
  return targets_T if vocabulary is None else targets_T - lax.axis_index(vocabulary) * width


def _sum_over(axes, x):
  return x if axes is None else lax.psum(x, axes)


def _stored(x):
  """x in a form that a loop can write into an array: bits if x is narrow, since XLA:CPU writes
  bfloat16 by casting the whole array to float32 and back."""
  return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _restored(x, dtype):
  return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x
