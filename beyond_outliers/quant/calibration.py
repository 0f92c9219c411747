"""Statistics of what the linear layers of a model see, over any number of batches.

Legend: B batch, L length, D model width, T = B·L tokens, K contraction, O outputs.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from beyond_outliers.quant import weights

Batch = Mapping[str, Any]


class Inputs(NamedTuple):
  """Of a layer's inputs, over all calibration tokens; float32 or wider."""
  largest_K: jax.Array             # max |x|
  mean_K: jax.Array                # mean |x|
  gram_KxK: jax.Array              # mean of x xᵀ


class Stage(NamedTuple):
  """A block, or whatever stands for one, with its parameters: (x_BxLxD, segment_ids, positions) -> (x_BxLxD, None)."""
  module: Any
  params: Any


class _Watched(nn.Module):
  """The plain product of a linear layer, which tells its input."""

  @nn.compact
  def __call__(self, lhs, rhs, dimension_numbers):
    del dimension_numbers
    self.sow("intermediates", "x", lhs)
    return weights.multiply(lhs, weights.Weight(rhs, jnp.ones((1, 1), jnp.float32)), None)


def watched(path: str) -> Any:
  """A `dot_general_for` of plain products, whose inputs can be read."""
  del path
  return _Watched


def of_block(model: Any, params: Any, before: list[Stage], block: Stage, batches: Iterable[Batch]) -> dict[str, Inputs]:
  """{path within the block: its inputs}, of a block whose module is made with `watched`; `before` runs in front of it."""
  return _mean(functools.partial(_see_block, block.module, block.params), stream(model, params, before, batches))


def of_head(model: Any, params: Any, before: list[Stage], batches: Iterable[Batch]) -> Inputs:
  """The inputs of the head, where `before` are all blocks."""
  return _mean(functools.partial(_see_head, model, params), stream(model, params, before, batches))


def stream(model: Any, params: Any, stages: list[Stage], batches: Iterable[Batch]) -> Iterator[tuple[Any, Any, Any]]:
  """(x_BxLxD, segment_ids or None, positions) behind all stages, batch by batch: nothing of a batch is kept."""
  for batch in batches:
    tokens_BxL = jnp.asarray(batch["tokens"])
    masks = batch.get("segment_ids"), batch.get("positions", jnp.arange(tokens_BxL.shape[1]))
    x_BxLxD = _embed(model, params, tokens_BxL)
    for module, stage_params in stages:
      x_BxLxD = _run(module, stage_params, x_BxLxD, *masks)
    yield x_BxLxD, *masks


# Modules are static: equal ones, as the blocks of most models are, share a compiled program.

@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, tokens_BxL):
  return model.apply({"params": params}, tokens_BxL, method="embed")


@functools.partial(jax.jit, static_argnums=0)
def _run(module, params, x_BxLxD, *masks):
  return module.apply({"params": params}, x_BxLxD, *masks)[0]


@functools.partial(jax.jit, static_argnums=0)
def _see_block(module, params, x_BxLxD, *masks):
  seen: Any = module.apply({"params": params}, x_BxLxD, *masks, mutable="intermediates")[1]["intermediates"]
  sown = dict[Any, Any](traverse_util.flatten_dict(seen))
  return {"/".join(path[:-2]): _inputs(x_TxK) for path, (x_TxK,) in sown.items()}


@functools.partial(jax.jit, static_argnums=0)
def _see_head(model, params, x_BxLxD, *masks):
  x_BxLxD = model.apply({"params": params}, x_BxLxD, method=lambda model, x: model.final_norm(x))
  return _inputs(x_BxLxD.reshape(-1, x_BxLxD.shape[-1]).astype(model.config.dtype))


def _inputs(x_TxK) -> Inputs:
  """Sums over the tokens in the places of means; the count of tokens goes with the mean."""
  x_TxK = x_TxK.astype(jnp.promote_types(x_TxK.dtype, jnp.float32))
  size = jnp.abs(x_TxK)
  return Inputs(jnp.max(size, axis=0), jnp.sum(size, axis=0), jnp.matmul(x_TxK.T, x_TxK, precision=lax.Precision.HIGHEST))


def _mean(see: Callable[..., Any], streams: Iterable[Any]) -> Any:
  """`see` of every batch as one: largest of the largest, means of the sums."""
  is_inputs, total, tokens = lambda node: isinstance(node, Inputs), None, 0
  for x_BxLxD, *masks in streams:
    seen = see(x_BxLxD, *masks)
    tokens += x_BxLxD.shape[0] * x_BxLxD.shape[1]
    total = seen if total is None else jax.tree.map(_join, total, seen, is_leaf=is_inputs)
    jax.block_until_ready(total)     # or the batches, which are sent off at once, would all be in memory
  return jax.tree.map(lambda sums: Inputs(sums.largest_K, sums.mean_K / tokens, sums.gram_KxK / tokens), total, is_leaf=is_inputs)


def _join(a: Inputs, b: Inputs) -> Inputs:
  return Inputs(jnp.maximum(a.largest_K, b.largest_K), a.mean_K + b.mean_K, a.gram_KxK + b.gram_KxK)
