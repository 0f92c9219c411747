"""The blocks of a model, run over one stacked tree of parameters in as few scans as possible.

Legend: B batch, L length, D model width.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beyond_outliers import config
from beyond_outliers.model import layers
from beyond_outliers.model.layers import DotGeneralFor, DotGenerals
from beyond_outliers.model.linears import linear_paths
from beyond_outliers.params import LAYERS, layer_path, leaves_by_path, tree_of

POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Collections that modules may write inside the scan; others would silently stay empty.
SOWN = ("intermediates", "statistics")

# Random streams that modules may draw from, besides that of the initial parameters; each layer gets
# its own.
STREAMS = ("rounding",)


def dot_generals_at(
  c: config.Model, dot_general_for: DotGeneralFor | None, depth: int
) -> DotGenerals:
  """What makes the dot_generals of the block at `depth`, by kind of linear layer."""
  return {
    kind: dot_general_for(layer_path(depth, kind)) if dot_general_for else None
    for kind in linear_paths(c)
  }


class ScannedBlocks(nn.Module):
  """A scan over `length` blocks with equal dot_generals."""

  config: config.Model
  dot_generals: DotGenerals
  length: int

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    c, block = self.config, layers.Block
    if c.remat != "none":
      # Inside a loop, XLA cannot merge the recomputation with the first computation. If all layers
      # are unrolled there is no loop, and JAX has to prevent it.
      block = nn.remat(block, policy=POLICIES[c.remat], prevent_cse=not c.unroll)
    scan = nn.scan(
      block,
      variable_axes=dict.fromkeys(("params", *SOWN), 0),
      split_rngs=dict.fromkeys(("params", *STREAMS), True),
      in_axes=(nn.broadcast, nn.broadcast),
      length=self.length,
      unroll=c.unroll or self.length,
      metadata_params={nn.PARTITION_NAME: LAYERS},
    )
    blocks = scan(c, self.dot_generals, name="blocks")
    nn.share_scope(self, blocks)
    return blocks(x_BxLxD, segment_ids_BxL, positions)[0]


class ConsecutiveScans(nn.Module):
  """One scan for each group of consecutive depths with equal dot_generals."""

  config: config.Model
  groups: tuple[tuple[DotGenerals, int], ...]  # (dot_generals, number of depths that share them)

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    for i, (dot_generals, length) in enumerate(self.groups):
      blocks = ScannedBlocks(self.config, dot_generals, length, name=f"run_{i}")
      x_BxLxD = blocks(x_BxLxD, segment_ids_BxL, positions)
    return x_BxLxD


class Stack(nn.Module):
  """All blocks, over one stacked tree, in as few scans as `dot_general_for` allows."""

  config: config.Model
  dot_general_for: DotGeneralFor | None

  @nn.compact
  def __call__(self, x_BxLxD, segment_ids_BxL, positions):
    groups = self.groups()
    if len(groups) == 1:
      stack = ScannedBlocks(self.config, *groups[0], name="stack")
    else:
      lengths = [length for _, length in groups]
      stack = nn.map_variables(
        ConsecutiveScans,
        ["params", *SOWN],
        mutable=True,
        init=self.is_initializing(),
        trans_in_fn=lambda variables: _split(variables, lengths),
        trans_out_fn=lambda variables: _join(variables, lengths),
      )(self.config, groups, name="stack")
    nn.share_scope(self, stack)
    return stack(x_BxLxD, segment_ids_BxL, positions)

  def groups(self) -> tuple[tuple[DotGenerals, int], ...]:
    """Groups of consecutive depths with equal dot_generals, as `ConsecutiveScans` takes them."""
    each = [
      dot_generals_at(self.config, self.dot_general_for, depth)
      for depth in range(self.config.blocks)
    ]
    return tuple((makers, len(list(group))) for makers, group in itertools.groupby(each))


def _split(variables: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
  """The parameters of each group of depths.

  Sown collections are not passed in: modules only write them."""
  if "params" not in variables:
    return {}
  ends = itertools.accumulate(lengths)
  depths = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
  return {
    "params": {
      f"run_{i}": jax.tree.map(lambda x, depths=of_group: x[depths], variables["params"])
      for i, of_group in enumerate(depths)
    }
  }


def _join(variables: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
  """For each collection, one stacked tree made of the groups' trees.

  A depth that lacks what others sowed holds NaN there, or 0 for integers. A depth that lacks a
  parameter of others holds an unused 0, which does not change norms."""
  joined = {}
  for collection, groups in variables.items():
    flat = [leaves_by_path(groups.get(f"run_{i}", {})) for i in range(len(lengths))]
    every = {path: leaf for tree in flat for path, leaf in tree.items()}
    fill = 0.0 if collection == "params" else jnp.nan
    stacks = []
    for tree, length in zip(flat, lengths, strict=True):
      absent = {
        path: jax.tree.map(lambda x, n=length, fill=fill: _absent(x, n, fill), like)
        for path, like in every.items()
        if path not in tree
      }
      stacks.append({path: absent[path] if path in absent else tree[path] for path in every})
    joined[collection] = tree_of(jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks))
  return joined


def _absent(like: Any, length: int, fill: float) -> jax.Array:
  """Filler for `length` depths that lack an array like this one."""
  value = fill if jnp.issubdtype(like.dtype, jnp.inexact) else 0
  return jnp.full((length, *like.shape[1:]), value, like.dtype)
