"""Statistics of the inputs of a model's linear layers, over any number of batches.

The residual stream between blocks is kept on the host, so that each block runs only once or twice
per batch, however deep the model is. Only one block's statistics are in memory at a time.

Legend: B batch, L length, D model width, T = B·L tokens, K contraction, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.ops.extremes import max_magnitude
from beyond_outliers.params import leaves_by_path, parent
from beyond_outliers.quant import qmatrix
from beyond_outliers.types import LanguageModel, Params

Batch = Mapping[str, Any]  # "tokens", and perhaps "segment_ids" and "positions"


class Inputs(NamedTuple):
  """Statistics of a layer's inputs, over all calibration tokens; float32 or wider."""

  largest_K: jax.Array  # max |x|
  mean_K: jax.Array  # mean |x|
  gram_KxK: Any  # mean of x xᵀ, or None if not asked for


class Stage(NamedTuple):
  """A block with its parameters: (x_BxLxD, segment_ids, positions) -> (x_BxLxD, None)."""

  module: Any
  params: Params


class _Watched(nn.Module):
  """The plain product of a linear layer that also sows its input."""

  @nn.compact
  def __call__(self, lhs, rhs, dimension_numbers):
    del dimension_numbers
    self.sow("intermediates", "x", lhs)
    return qmatrix.matmul(lhs, qmatrix.QuantizedMatrix(rhs, jnp.ones((1, 1), jnp.float32)), None)


def watched(path: str) -> Any:
  """A `dot_general_for` of plain products that sow their inputs."""
  del path
  return _Watched


class Stream:
  """The residual stream of all batches at one place of the model; initially before its blocks.

  model, params: used for the embedding and the final norm."""

  def __init__(self, model: LanguageModel, params: Params, batches: Iterable[Batch]):
    self._model, self._params, self._batches = model, params, []
    self._ahead: Stage | None = None
    for batch in batches:
      tokens_BxL = jnp.asarray(batch["tokens"])
      masks = batch.get("segment_ids"), batch.get("positions", jnp.arange(tokens_BxL.shape[1]))
      self._batches.append((jax.device_get(embed(model, params, tokens_BxL)), masks))

  def see(self, block: Stage, *, gram: bool, run: bool) -> dict[str, Inputs]:
    """{path within the block: Inputs} of a block whose module was made with `watched`. run: advance
    the stream past the block."""
    return self._mean(functools.partial(_see_block, block.module, gram, run, block.params))

  def see_head(self, *, gram: bool) -> Inputs:
    """The inputs of the head, once the stream is past all blocks."""
    return self._mean(functools.partial(_see_head, self._model, gram, self._params))

  def run(self, block: Stage) -> None:
    """Advances the stream past the block, at the next call of `see` or `see_head`."""
    self._ahead = block

  def _mean(self, see: Callable[..., Any]) -> Any:
    """`see` of every batch, combined: maxima of maxima, means from sums."""
    total: Any = None
    tokens = 0
    for number, (x_BxLxD, masks) in enumerate(self._batches):
      if self._ahead is not None:
        x_BxLxD = run_block(*self._ahead, x_BxLxD, *masks)
      seen, x_BxLxD = see(x_BxLxD, *masks)
      tokens += x_BxLxD.shape[0] * x_BxLxD.shape[1]
      total = seen if total is None else jax.tree.map(_sum, total, seen, is_leaf=_is_inputs)
      # device_get also waits: JAX dispatches without waiting, so that otherwise all batches would
      # be in the device's memory at once.
      self._batches[number] = jax.device_get(x_BxLxD), masks
    self._ahead = None
    return jax.tree.map(functools.partial(_mean, tokens), total, is_leaf=_is_inputs)


# Modules are static arguments: equal ones, such as most models' blocks, share a compiled program.


@functools.partial(jax.jit, static_argnums=0)
def embed(model, params, tokens_BxL):
  """The first block's input, [B, L, D]."""
  return model.apply({"params": params}, tokens_BxL, method="embed")


@functools.partial(jax.jit, static_argnums=0)
def run_block(module, params, x_BxLxD, *masks):
  """A block's output, [B, L, D]. masks: segment ids (or None), and positions."""
  return module.apply({"params": params}, x_BxLxD, *masks)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _see_block(module, gram, run, params, x_BxLxD, *masks):
  (y_BxLxD, _), seen = module.apply({"params": params}, x_BxLxD, *masks, mutable="intermediates")
  sown = leaves_by_path(seen["intermediates"])  # <kind of layer>/<module of the product>/x
  inputs = {parent(parent(path)): _inputs(x_TxK, gram) for path, (x_TxK,) in sown.items()}
  return inputs, y_BxLxD if run else x_BxLxD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _see_head(model, gram, params, x_BxLxD, *masks):
  normed_BxLxD = model.apply(
    {"params": params}, x_BxLxD, method=lambda model, x: model.final_norm(x)
  )
  x_TxD = normed_BxLxD.reshape(-1, x_BxLxD.shape[-1]).astype(model.config.dtype)
  return _inputs(x_TxD, gram), x_BxLxD


def _inputs(x_TxK, gram) -> Inputs:
  """Inputs with sums over the tokens in place of means; `_mean` divides by the number of tokens."""
  x_TxK = x_TxK.astype(jnp.promote_types(x_TxK.dtype, jnp.float32))
  gram_KxK = jnp.matmul(x_TxK.T, x_TxK, precision=lax.Precision.HIGHEST) if gram else None
  return Inputs(max_magnitude(x_TxK, 0), jnp.sum(jnp.abs(x_TxK), axis=0), gram_KxK)


def _is_inputs(node: Any) -> bool:
  return isinstance(node, Inputs)


def _sum(a: Inputs, b: Inputs) -> Inputs:
  return jax.tree.map(jnp.add, a, b)._replace(largest_K=jnp.maximum(a.largest_K, b.largest_K))


def _mean(tokens: int, sums: Inputs) -> Inputs:
  return jax.tree.map(lambda x: x / tokens, sums)._replace(largest_K=sums.largest_K)
