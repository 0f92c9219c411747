"""The decoder: the study's architecture (arXiv 2509.23500), and by other switches of the same code
OLMo2 and Llama.

Layers are stacked: every parameter under `layers` has the depth as its first axis, whatever runs
over it.
Legend: B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from beyond_outliers import config
from beyond_outliers.model import layers
from beyond_outliers.ops import dot
from beyond_outliers.params import Axes

POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Collections that modules may write under the scan; one that is not named here would silently stay
# empty.
SOWN = ("intermediates", "statistics")

# Streams of random numbers that modules may draw from, beside that of the initial parameters: each
# layer gets its own.
STREAMS = ("rounding",)


def linear_paths(c: config.Model) -> list[str]:
  """The linear layers of one block, as `dot_general_for` sees them behind `layers/<depth>/`."""
  mlp = ["mlp/up", "mlp/gate", "mlp/down"] if c.mlp == "swiglu" else ["mlp/up", "mlp/down"]
  return ["attention/q", "attention/k", "attention/v", "attention/o", *mlp]


def contractions(c: config.Model) -> dict[str, tuple[int, bool]]:
  """Every linear layer by path: how many numbers it sums over, and whether these are split over the
  mesh's axis `model`."""
  inputs = {"attention/o": (c.heads * c.d_head, True), "mlp/down": (c.mlp_hidden, True)}
  layers_of_blocks = {
    f"layers/{depth}/{path}": inputs.get(path, (c.d_model, False))
    for depth in range(c.blocks)
    for path in linear_paths(c)
  }
  return {**layers_of_blocks, "head": (c.d_model, False)}


class Linears(NamedTuple):
  """All linear layers of one kind."""

  paths: tuple[str, ...]  # as `dot_general_for` sees them, by depth
  kernels: Any  # by depth, two axes each
  axis: int  # of a kernel, that is summed over
  own: Any  # parameters of their dot_generals, by depth


def linears(c: config.Model, params: Any) -> dict[str, Linears]:
  """The linear layers of a model by kind, `attention/q` to `mlp/down` and `head`, with their
  parameters."""
  own, found = of_dot_generals(c, params), {}
  for kind in linear_paths(c):
    paths = tuple(f"layers/{depth}/{kind}" for depth in range(c.blocks))
    found[kind] = Linears(paths, _below(params["layers"], kind)["kernel"], 0, own.get(kind))
  kernel, axis = (params["embedding"], 1) if c.tied else (params["head"]["kernel"], 0)
  found["head"] = Linears(
    ("head",), kernel[None], axis, jax.tree.map(lambda x: x[None], own.get("head"))
  )
  return found


def of_dot_generals(c: config.Model, tree: Any) -> dict[str, Any]:
  """What a tree like the parameters, or a collection that was sown, holds of the dot_generals of
  each kind; of some, nothing."""
  found = {kind: _below(tree.get("layers", {}), kind) for kind in linear_paths(c)} | {
    "head": tree.get("head", {})
  }
  modules = {
    kind: [value for name, value in linear.items() if name != "kernel"]
    for kind, linear in found.items()
  }
  if "head_dot_general" in tree:
    modules["head"] = [tree["head_dot_general"]]
  return {kind: own[0] for kind, own in modules.items() if own}


def _below(tree: Any, path: str) -> Any:
  for name in path.split("/"):
    tree = tree.get(name, {})
  return tree


def without_own(c: config.Model, params: Any) -> Any:
  """The parameters but those that dot_generals have of their own."""

  def common(like, tree):
    return (
      {name: common(value, tree[name]) for name, value in like.items()}
      if isinstance(like, dict)
      else tree
    )

  return common(shapes(Transformer(c)), params)


class Run(nn.Module):
  """A scan over `length` equal blocks."""

  config: config.Model
  dot_generals: dict[str, layers.DotGeneralCls | None]
  length: int

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    c, block = self.config, layers.Block
    if c.remat != "none":
      # A loop keeps XLA from merging what is recomputed with what was computed; where all layers
      # are unrolled there is none.
      block = nn.remat(block, policy=POLICIES[c.remat], prevent_cse=not c.unroll)
    scan = nn.scan(
      block,
      variable_axes=dict.fromkeys(("params", *SOWN), 0),
      split_rngs=dict.fromkeys(("params", *STREAMS), True),
      in_axes=(nn.broadcast, nn.broadcast),
      length=self.length,
      unroll=c.unroll or self.length,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    blocks = scan(c, self.dot_generals, name="blocks")
    nn.share_scope(self, blocks)
    return blocks(x_BxLxD, segment_ids_BxL, positions)[0]


class Runs(nn.Module):
  """One scan after another, for depths whose linear layers differ."""

  config: config.Model
  runs: tuple[tuple[dict[str, layers.DotGeneralCls | None], int], ...]

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    for i, (dot_generals, length) in enumerate(self.runs):
      x_BxLxD = Run(self.config, dot_generals, length, name=f"run_{i}")(
        x_BxLxD, segment_ids_BxL, positions
      )
    return x_BxLxD


class Stack(nn.Module):
  """All blocks over one stacked tree, in as few scans as `dot_general_for` allows."""

  config: config.Model
  dot_general_for: Callable[[str], layers.DotGeneralCls | None] | None

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    runs = self.runs()
    if len(runs) == 1:
      stack = Run(self.config, *runs[0], name="stack")
    else:
      lengths = [length for _, length in runs]
      stack = nn.map_variables(
        Runs,
        ["params", *SOWN],
        mutable=True,
        init=self.is_initializing(),
        trans_in_fn=lambda variables: _split(variables, lengths),
        trans_out_fn=lambda variables: _join(variables, lengths),
      )(self.config, runs, name="stack")
    nn.share_scope(self, stack)
    return stack(x_BxLxD, segment_ids_BxL, positions)

  def runs(self):
    """((dot_general makers of a block by path, how many blocks in a row share them), ...)."""
    dot_general_for = self.dot_general_for or (lambda path: None)
    each = [
      {path: dot_general_for(f"layers/{depth}/{path}") for path in linear_paths(self.config)}
      for depth in range(self.config.blocks)
    ]
    return tuple((makers, len(list(group))) for makers, group in itertools.groupby(each))


def _split(variables: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
  """The parameters of each run. What was sown before stays outside: it only comes out of a
  module."""
  ends = list(itertools.accumulate(lengths))
  return (
    {
      "params": {
        f"run_{i}": jax.tree.map(lambda x, a=end - length, b=end: x[a:b], variables["params"])
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
      }
    }
    if "params" in variables
    else {}
  )


def _join(variables: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
  """One tree of the runs' in each collection. Where others sowed and a depth did not, it holds NaN,
  or 0 for integers; where others have a parameter, an unused 0, of which norms know nothing."""
  joined = {}
  for collection, runs in variables.items():
    flat = [traverse_util.flatten_dict(runs.get(f"run_{i}", {})) for i in range(len(lengths))]
    every = {path: leaf for tree in flat for path, leaf in tree.items()}
    fill = 0.0 if collection == "params" else jnp.nan
    padded = [
      {
        path: tree[path]
        if path in tree
        else jax.tree.map(lambda x, n=n, fill=fill: _absent(x, n, fill), like)
        for path, like in every.items()
      }
      for tree, n in zip(flat, lengths, strict=True)
    ]
    joined[collection] = traverse_util.unflatten_dict(
      jax.tree.map(lambda *parts: jnp.concatenate(parts), *padded)
    )
  return joined


def _absent(like: Any, length: int, fill: float) -> Any:
  return jnp.full(
    (length, *like.shape[1:]), fill if jnp.issubdtype(like.dtype, jnp.inexact) else 0, like.dtype
  )


class Transformer(nn.Module):
  """apply({"params": params}, tokens_BxL, segment_ids=None, positions=None) -> logits_BxLxV,
  float32 at least.

  segment_ids, positions: int32 [B, L]; with segment_ids a token attends only to its own segment.
  dot_general_for: path of a linear layer (`layers/3/mlp/up`, `head`) -> what makes its dot_general,
  or None for the plain one. Depths that get unequal answers run as separate scans over slices of
  the same stacked parameters."""

  config: config.Model
  dot_general_for: Callable[[str], layers.DotGeneralCls | None] | None = None

  def setup(self):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(c.init_std), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (c.vocab, c.d_model), jnp.float32)
    self.layers = Stack(c, self.dot_general_for)
    self.final_norm = layers.RmsNorm(c.norm_eps)
    head_cls = self.dot_general_for("head") if self.dot_general_for else None
    if c.tied:
      self.head_dot_general = head_cls() if head_cls else dot.dot_general
    else:
      self.head = layers.Linear(
        c.vocab, ("embed", "vocab"), jnp.dtype(c.dtype), c.init_std, head_cls
      )

  @nn.nowrap
  def axes(self, params: Any = None) -> Any:
    """A tree like the parameters of `Axes`, from the logical names: what optimizers take as
    `axes`."""
    del params
    return axes(self)

  @nn.nowrap
  def contractions(self) -> dict[str, tuple[int, bool]]:
    """As the function of this name."""
    return contractions(self.config)

  @nn.nowrap
  def block(self, depth: int) -> layers.Block:
    """The block at `depth` by itself: (x_BxLxD, segment_ids, positions) -> (x_BxLxD, None).

    Its parameters are the slices at `depth` of those under `layers`."""
    dot_general_for = self.dot_general_for or (lambda path: None)
    makers = {path: dot_general_for(f"layers/{depth}/{path}") for path in linear_paths(self.config)}
    return layers.Block(
      self.config, flax.core.freeze(makers)
    )  # hashable, so that equal blocks share compiled programs

  def __call__(self, tokens_BxL, segment_ids=None, positions=None):
    return self.logits(self.hidden(tokens_BxL, segment_ids, positions))

  def hidden(self, tokens_BxL, segment_ids=None, positions=None):
    """What the head sees: the final norm's output, [B, L, D]."""
    positions = jnp.arange(tokens_BxL.shape[1]) if positions is None else positions
    return self.final_norm(self.layers(self.embed(tokens_BxL), segment_ids, positions))

  def embed(self, tokens_BxL):
    """What the first block sees, [B, L, D]."""
    x_BxLxD = jnp.take(self.table(), tokens_BxL, axis=0).astype(
      layers.at_least_float32(self.config.dtype)
    )
    return nn.with_logical_constraint(x_BxLxD, ("batch", "length", None))

  def table(self):
    """The embedding [V, D], gathered over fsdp: a look-up in rows that are themselves split is what
    XLA partitions badly."""
    return nn.with_logical_constraint(self.embedding, ("vocab", None))

  def logits(self, x_BxLxD):
    """The head on what `hidden` returns, or on any [..., D]."""
    if not self.config.tied:
      return self.head(x_BxLxD).astype(layers.at_least_float32(self.config.dtype))
    dtype = jnp.dtype(self.config.dtype)
    rows = x_BxLxD.reshape(-1, x_BxLxD.shape[-1]).astype(dtype)
    y = self.head_dot_general(
      rows, layers.as_operand(self.table(), dtype), (((1,), (1,)), ((), ()))
    )
    return y.reshape(*x_BxLxD.shape[:-1], self.config.vocab).astype(layers.at_least_float32(dtype))


def init(model: Transformer, seed: int) -> Any:
  """Fresh parameters, unboxed, float32."""
  return nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])


def boxed_shapes(model: Transformer) -> Any:
  """The abstract parameters with their logical axis names."""
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  )


def shapes(model: Transformer) -> Any:
  """The abstract parameters: ShapeDtypeStructs."""
  return jax.eval_shape(lambda: init(model, 0))


def axes(model: Transformer) -> Any:
  """A tree like the parameters of `Axes`: which axes are batch, fan-in and fan-out, from the
  logical names."""
  boxes = boxed_shapes(model)
  return jax.tree.map(
    lambda box: _axes(box.names), boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )


def _axes(names: tuple[str, ...]) -> Axes:
  batch = tuple(i for i, name in enumerate(names) if name == "layers")
  rest = [i for i in range(len(names)) if i not in batch]
  if len(rest) == 1:
    return Axes(batch, (), (rest[0],))
  fan_in, fan_out = (
    reversed(rest) if names[rest[0]] == "vocab" else rest
  )  # the embedding is the head's matrix, transposed
  return Axes(batch, (fan_in,), (fan_out,))


def count(params: Any) -> dict[str, int]:
  """Parameters in all, of the embedding, and of the rest."""
  total, embedding = sum(x.size for x in jax.tree.leaves(params)), params["embedding"].size
  return {"total": total, "embedding": embedding, "other": total - embedding}


def flops_per_token(c: config.Model, context: int) -> float:
  """Model FLOPs of one training token, forward and backward: 6 a matrix parameter,
  12·blocks·heads·d_head·L for attention.

  The usual accounting (arXiv 2204.02311, appendix B): the causal half is not discounted, the
  embedding look-up is free."""
  width, kv_width = c.heads * c.d_head, c.kv_heads * c.d_head
  mlp_matrices = 3 if c.mlp == "swiglu" else 2
  block = 2 * c.d_model * (width + kv_width) + mlp_matrices * c.d_model * c.mlp_hidden
  return 6 * (c.blocks * block + c.vocab * c.d_model) + 12 * c.blocks * width * context
