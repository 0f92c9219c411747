"""The decoder: the study's architecture (arXiv 2509.23500), or with other switches OLMo2 or Llama.

Layers are stacked: every parameter under `layers` has the depth as its first axis (params.py).
Legend: B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from beyond_outliers import config
from beyond_outliers.model import layers, linears
from beyond_outliers.model.loss import cross_entropy, flat_logits
from beyond_outliers.model.stack import Stack, dot_generals_at
from beyond_outliers.ops import dot
from beyond_outliers.ops.linear_cross_entropy import linear_cross_entropy
from beyond_outliers.params import KERNEL, LAYERS, Axes
from beyond_outliers.types import Params


class Transformer(nn.Module):
  """Decoder-only language model.

  apply({"params": params}, tokens_BxL, segment_ids=None, positions=None) -> logits_BxLxV, float32
  at least.

  segment_ids, positions: int32 [B, L]; with segment_ids a token attends only to its own segment.
  If segments continue others, as in a tree, segment_ids is [B, L, 2]: with segments numbered depth
  first, the token's own and the last of its descendants (the intervals of FlashMask, arXiv
  2410.01359).
  dot_general_for: path of a linear layer (`layers/3/mlp/up`, `head`) -> what makes its dot_general,
  or None for the plain one. Depths with unequal answers run as separate scans over slices of the
  same stacked parameters.
  origin: the Hugging Face directory that the model was read from, if any; its other files are
  copied when the model is written."""

  config: config.Model
  dot_general_for: layers.DotGeneralFor | None = None
  origin: str | None = None

  def setup(self):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(c.init_std), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (c.vocab, c.d_model), jnp.float32)
    self.layers = Stack(c, self.dot_general_for)
    self.final_norm = layers.rms_norm(c)
    head_cls = self.dot_general_for("head") if self.dot_general_for else None
    if c.tied:
      self.head_dot_general = head_cls() if head_cls else dot.dot_general
    else:
      self.head = layers.Linear(
        c.vocab, ("embed", "vocab"), jnp.dtype(c.dtype), c.init_std, head_cls
      )

  @nn.nowrap
  def axes(self, params: Params | None = None) -> Any:
    """`Axes` of the parameters, as a tree like them: the argument `axes` of an optimizer."""
    del params
    return axes(self)

  @nn.nowrap
  def contractions(self) -> dict[str, tuple[int, bool]]:
    """Linear layers by path: (contraction width, whether mesh axis `model` splits it)."""
    return linears.contractions(self.config)

  @nn.nowrap
  def block(self, depth: int) -> layers.Block:
    """The block at `depth` as a module: (x_BxLxD, segment_ids, positions) -> (x_BxLxD, None).

    Its parameters are the slices at `depth` of those under `layers`."""
    makers = dot_generals_at(self.config, self.dot_general_for, depth)
    # Hashable, so that equal blocks share compiled programs.
    return layers.Block(self.config, flax.core.freeze(makers))

  def __call__(self, tokens_BxL, segment_ids=None, positions=None):
    return self.logits(self.hidden(tokens_BxL, segment_ids, positions))

  def hidden(self, tokens_BxL, segment_ids=None, positions=None):
    """The head's input, which is the final norm's output: [B, L, D]."""
    positions = jnp.arange(tokens_BxL.shape[1]) if positions is None else positions
    return self.final_norm(self.layers(self.embed(tokens_BxL), segment_ids, positions))

  def embed(self, tokens_BxL):
    """The first block's input, [B, L, D]."""
    x_BxLxD = jnp.take(self.table(), tokens_BxL, axis=0)
    x_BxLxD = x_BxLxD.astype(layers.at_least_float32(self.config.dtype))
    return nn.with_logical_constraint(x_BxLxD, ("batch", "length", None))

  def table(self):
    """The embedding [V, D], gathered over fsdp: XLA partitions look-ups in split rows badly."""
    return layers.whole(self.embedding, ("vocab", "embed"))

  def logits(self, x_BxLxD):
    """The head's output for what `hidden` returns, or for any [..., D]."""
    if not self.config.tied:
      return self.head(x_BxLxD).astype(layers.at_least_float32(self.config.dtype))
    dtype = jnp.dtype(self.config.dtype)
    rows = x_BxLxD.reshape(-1, x_BxLxD.shape[-1]).astype(dtype)
    table = layers.as_operand(self.table(), dtype)
    y = self.head_dot_general(rows, table, (((1,), (1,)), ((), ())))
    return y.reshape(*x_BxLxD.shape[:-1], self.config.vocab).astype(layers.at_least_float32(dtype))

  def losses(self, tokens_BxL, segment_ids=None, positions=None, *, targets_BxL):
    """Negative log-likelihood in nats of every target, [B, L], float32 at least. Unless the head is
    quantized, its logits never exist all at once."""
    x_BxLxD, targets_T = self.hidden(tokens_BxL, segment_ids, positions), targets_BxL.reshape(-1)
    if self.dot_general_for is not None and self.dot_general_for("head") is not None:
      nll_T = cross_entropy(flat_logits(self.logits(x_BxLxD)), targets_T)
    else:
      dtype = jnp.dtype(self.config.dtype)
      weights, axis = (
        (self.table(), 0) if self.config.tied else (self.head.get_variable("params", KERNEL), 1)
      )
      nll_T = linear_cross_entropy(
        x_BxLxD.reshape(-1, x_BxLxD.shape[-1]).astype(dtype),
        layers.as_operand(weights, dtype),
        targets_T,
        axis,
        nn.logical_to_mesh_axes(("batch", "vocab")),
      )
    return nll_T.reshape(targets_BxL.shape)


def init(model: Transformer, seed: int) -> Params:
  """Fresh parameters, unboxed, float32."""
  return nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])


def boxed_shapes(model: Transformer) -> Any:
  """The abstract parameters, boxed with their logical axis names."""
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  )


def shapes(model: Transformer) -> Params:
  """The abstract parameters: ShapeDtypeStructs."""
  return jax.eval_shape(lambda: init(model, 0))


def without_dot_general_params(c: config.Model, params: Params) -> Params:
  """The parameters of the plain model, without those of dot_generals, such as learned scales."""

  def common(like, tree):
    if not isinstance(like, dict):
      return tree
    return {name: common(node, tree[name]) for name, node in like.items()}

  return common(shapes(Transformer(c)), params)


def axes(model: Transformer) -> Any:
  """`Axes` of the parameters (batch, fan-in, fan-out), derived from their logical names."""
  return jax.tree.map(
    lambda box: _axes(box.names),
    boxed_shapes(model),
    is_leaf=lambda node: isinstance(node, nn.Partitioned),
  )


def _axes(names: tuple[str, ...]) -> Axes:
  batch = tuple(i for i, name in enumerate(names) if name == LAYERS)
  rest = [i for i in range(len(names)) if i not in batch]
  if len(rest) == 1:
    return Axes(batch, (), (rest[0],))
  # The embedding's rows are outputs: it is the transpose of a head's matrix.
  fan_in, fan_out = reversed(rest) if names[rest[0]] == "vocab" else rest
  return Axes(batch, (fan_in,), (fan_out,))


def count(params: Params) -> dict[str, int]:
  """Numbers of parameters: in total, in the embedding, and in the rest."""
  total, embedding = sum(x.size for x in jax.tree.leaves(params)), params["embedding"].size
  return {"total": total, "embedding": embedding, "other": total - embedding}


def flops_per_token(c: config.Model, context: int) -> float:
  """Model FLOPs of one training token, forward and backward.

  6 per matrix parameter, 12·blocks·heads·d_head·L for attention.

  The usual accounting (arXiv 2204.02311, appendix B): no discount for the causal mask, and the
  embedding look-up is free."""
  width, kv_width = c.heads * c.d_head, c.kv_heads * c.d_head
  mlp_matrices = 3 if c.mlp == "swiglu" else 2
  block = 2 * c.d_model * (width + kv_width) + mlp_matrices * c.d_model * c.mlp_hidden
  return 6 * (c.blocks * block + c.vocab * c.d_model) + 12 * c.blocks * width * context
