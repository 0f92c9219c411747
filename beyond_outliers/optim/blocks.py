"""Stacks of equally shaped blocks: the layout in which Shampoo, SOAP, PSGD, Muon and Scion compute
and keep their state.

Every parameter is a batch of matrices or vectors (axes.py). Each of these is cut into blocks, and
all blocks of one shape, from all parameters, form a bucket: one array [B, m, n] (m <= n; tall
blocks are transposed) or [B, n]. The stack axis B is split over the whole mesh, so a device owns
whole blocks: factors, roots and Newton-Schulz iterations need no communication, and nothing is
stored or computed twice. Data is resharded once on the way in (`stack`) and once on the way out
(`unstack`).

After the real blocks, B is padded with zero blocks to a multiple of the number of devices. The
order of real blocks does not depend on the mesh: state written on one mesh fits another once
padding is cut or added.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from beyond_outliers.optim.axes import AxesTree, Leaf, leaves
from beyond_outliers.params import path_of

# The field of an optimizer's state that holds the arrays of blocks, stack axis first.
FIELD = "blocks"

Split = tuple[tuple[str, ...], ...]  # the mesh axes along each axis of an array
Stacks = dict[str, jax.Array]  # bucket name -> [B, m, n], [B, n], or [B] for one value per block


@dataclasses.dataclass(frozen=True)
class BlockGrid:
  """Grid of equal adjacent blocks, all in one bucket, that recurs in each slice of one leaf."""

  leaf: int  # index in Layout.leaves
  start: tuple[int, ...]  # where the grid begins in a slice
  grid: tuple[int, ...]  # blocks along each axis of a slice
  block: tuple[int, ...]  # shape of a block, as it lies in the slice
  transposed: bool  # whether the bucket holds the transposed blocks
  count: int  # blocks, over all slices

  def cut(self, y: jax.Array) -> jax.Array:
    """Blocks of a leaf: [slices, *size] -> [count, *shape in the bucket]."""
    along = zip(self.start, self.grid, self.block, strict=True)
    region = y[(slice(None), *(slice(s, s + g * b) for s, g, b in along))]
    if math.prod(self.grid) > 1 and len(self.grid) == 2:
      (g, h), (m, n) = self.grid, self.block
      region = region.reshape(-1, g, m, h, n).swapaxes(2, 3)
    blocks = region.reshape(self.count, *self.block)
    return blocks.swapaxes(1, 2) if self.transposed else blocks

  def paste(self, blocks: jax.Array, slices: int) -> jax.Array:
    """The inverse of `cut`: the region of every slice that the grid covers."""
    blocks = blocks.swapaxes(1, 2) if self.transposed else blocks
    if math.prod(self.grid) > 1 and len(self.grid) == 2:
      (g, h), (m, n) = self.grid, self.block
      blocks = blocks.reshape(slices, g, h, m, n).swapaxes(2, 3)
    return blocks.reshape(slices, *(g * b for g, b in zip(self.grid, self.block, strict=True)))


@dataclasses.dataclass(frozen=True)
class Bucket:
  """All blocks of one shape."""

  shape: tuple[int, ...]  # (m, n) with m <= n, or (n,)
  grids: tuple[BlockGrid, ...]
  count: int  # real blocks
  padded: int  # with the padding: a multiple of the number of devices

  @property
  def real(self) -> np.ndarray:
    """Mask of real blocks, [B]; the others are padding."""
    return np.arange(self.padded) < self.count

  def zeros(self, *shape: int, dtype: Any) -> jax.Array:
    return jnp.zeros((self.padded, *shape), dtype)

  def identity(self, d: int, dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(d, dtype=dtype), (self.padded, d, d))


@dataclasses.dataclass(frozen=True)
class Layout:
  """Layout of a tree's blocks: static; it depends on shapes, axes and mesh alone."""

  leaves: tuple[Leaf, ...]
  buckets: dict[str, Bucket]  # by name: "768x1024" or "768"
  dtype: np.dtype  # of stacks: float32, or a leaf's type that is wider
  mesh: jax.sharding.Mesh | None

  def stack(self, tree: Any) -> Stacks:
    """Blocks of a tree like the parameters, each on the device that owns it: [B, *shape] per
    bucket."""
    slices = [leaf.split(x) for leaf, x in zip(self.leaves, jax.tree.leaves(tree), strict=True)]
    stacks = {}
    for name, bucket in self.buckets.items():
      parts = [grid.cut(slices[grid.leaf]) for grid in bucket.grids]
      if bucket.padded > bucket.count:
        parts.append(jnp.zeros((bucket.padded - bucket.count, *bucket.shape), parts[0].dtype))
      stack = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
      # Resharded before the cast: half the bytes when gradients are bfloat16.
      stacks[name] = self._split(stack, *self._way(stack.ndim)).astype(self.dtype)
    return stacks

  def unstack(self, stacks: Stacks, like: Any) -> Any:
    """The inverse of `stack`, in the structure and dtypes of `like`."""
    pieces: list[dict[tuple[int, ...], jax.Array]] = [{} for _ in self.leaves]
    for name, bucket in self.buckets.items():
      stack, at = self._split(stacks[name], *self._way(stacks[name].ndim, back=True)), 0
      for grid in bucket.grids:
        blocks = stack[at : at + grid.count]
        pieces[grid.leaf][grid.start] = grid.paste(blocks, self.leaves[grid.leaf].slices)
        at += grid.count
    flat, structure = jax.tree.flatten(like)
    joined = [
      leaf.join(_assemble(p)).astype(x.dtype) if p else x
      for leaf, p, x in zip(self.leaves, pieces, flat, strict=True)
    ]
    return jax.tree.unflatten(structure, joined)

  def on_each_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(blocks, common)` applied to each device's own blocks, without communication.

    blocks, and what the function returns: trees of arrays with the stack axis first. common: a tree
      of arrays that every device sees whole."""
    if self.mesh is None or self.mesh.size == 1:
      return function
    split = PartitionSpec(self.mesh.axis_names)
    return jax.shard_map(
      function, mesh=self.mesh, in_specs=(split, PartitionSpec()), out_specs=split, check_vma=False
    )

  def per_block(self, value: Callable[[Leaf], float]) -> dict[str, np.ndarray]:
    """One value per block, from the leaf that it was cut from; 0 for padding. [B] per bucket."""

    def of(bucket: Bucket) -> np.ndarray:
      grids = [np.full(grid.count, value(self.leaves[grid.leaf])) for grid in bucket.grids]
      return np.concatenate([*grids, np.zeros(bucket.padded - bucket.count)]).astype(self.dtype)

    return {name: of(bucket) for name, bucket in self.buckets.items()}

  def block_ids(self) -> dict[str, np.ndarray]:
    """Ids of blocks, consecutive over all buckets. int32 [B] per bucket.

    Padding reuses the ids that follow, which are the next bucket's."""
    found, first = {}, 0
    for name, bucket in self.buckets.items():
      found[name] = np.arange(first, first + bucket.padded, dtype=np.int32)
      first += bucket.count
    return found

  def sum_over_slices(self, values: Stacks) -> Stacks:
    """Each block's value replaced by the sum over all blocks of its slice.

    [B] or [B, values] per bucket."""
    if all(
      math.prod(grid.grid) == 1 and grid.block == self.leaves[grid.leaf].size
      for bucket in self.buckets.values()
      for grid in bucket.grids
    ):
      return values  # every slice is one block
    first = np.cumsum([0, *(leaf.slices for leaf in self.leaves)])
    owners = {}
    for name, bucket in self.buckets.items():
      of_grids = [
        first[grid.leaf] + np.arange(grid.count) // math.prod(grid.grid) for grid in bucket.grids
      ]
      owners[name] = np.concatenate([*of_grids, np.full(bucket.padded - bucket.count, first[-1])])
    every = jnp.concatenate([values[name] for name in self.buckets])
    sums = jax.ops.segment_sum(
      every, np.concatenate(list(owners.values())), num_segments=int(first[-1]) + 1
    )
    return {
      name: self._split(sums[owner], (self._names, *((),) * (sums.ndim - 1)))
      for name, owner in owners.items()
    }

  @property
  def _names(self) -> tuple[str, ...]:
    return () if self.mesh is None else self.mesh.axis_names

  def _way(self, ndim: int, *, back: bool = False) -> Sequence[Split]:
    """Successive shardings of a stack with `ndim` axes, from split blocks to whole ones on their
    owners, or back.

    One mesh axis after another moves to the stack axis, each by a slice or an all-to-all; asked for
    all at once, XLA gathers whole parameters. Blocks begin split as most parameters are: by the
    last mesh axes only. On the way back the other axes split them too, so that no padding is
    gathered along those."""
    names = self._names
    spare, inner = names[: 1 - ndim], names[1 - ndim :]

    def split(moved: int) -> Split:
      return names[:moved], *(() if name in names[:moved] else (name,) for name in inner)

    way = [split(moved) for moved in range(len(names) + 1)]
    if not back:
      return way
    return [*way[:0:-1], ((), *((name,) for name in inner[:-1]), (*inner[-1:], *spare))]

  def _split(self, x: jax.Array, *ways: Split) -> jax.Array:
    """x resharded to each of `ways` in turn; an axis that mesh axes don't divide stays whole."""
    if self.mesh is None or self.mesh.size == 1:
      return x
    for way in ways:
      parts = [math.prod(self.mesh.shape[name] for name in names) for names in way]
      along = zip(way, parts, x.shape, strict=True)
      spec = PartitionSpec(*(None if length % n else names for names, n, length in along))
      x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
    return x


def layout(
  tree: Any,
  axes: AxesTree = None,
  *,
  mesh: jax.sharding.Mesh | None = None,
  block_size: int | None = None,
  merge_up_to: int = 0,
) -> Layout:
  """Layout of `tree` (arrays or shapes) in blocks of at most block_size along each axis.

  The last block along an axis may be smaller.

  block_size None: every slice is one block. merge_up_to: a matrix of at most that many elements
  becomes one vector, as in Meta's Shampoo by default. Scalars become vectors of length 1. A leaf
  without elements has no blocks.
  Errors: those of `axes.leaves`."""
  records = list(leaves(tree, axes))
  grids: dict[tuple[int, ...], list[BlockGrid]] = {}
  for index, leaf in enumerate(records):
    if math.prod(leaf.shape) == 0:
      continue  # nothing to cut, and Orbax saves no empty arrays
    size = leaf.size or (1,)
    if math.prod(size) <= merge_up_to:
      size = (math.prod(size),)
    if size != leaf.size:
      records[index] = dataclasses.replace(leaf, size=size, fan_in_axis=None)
    for segments in itertools.product(*(_segments(length, block_size) for length in size)):
      start, grid, block = zip(*segments, strict=True)
      shape = tuple(sorted(block))
      count = leaf.slices * math.prod(grid)
      grids.setdefault(shape, []).append(
        BlockGrid(index, start, grid, block, block != shape, count)
      )
  devices = 1 if mesh is None else mesh.size
  buckets = {}
  for shape, of_shape in grids.items():
    count = sum(grid.count for grid in of_shape)
    padded = -(-count // devices) * devices
    buckets["x".join(map(str, shape))] = Bucket(shape, tuple(of_shape), count, padded)
  dtype = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(tree)))
  return Layout(tuple(records), buckets, np.dtype(dtype), mesh)


def _segments(length: int, block_size: int | None) -> list[tuple[int, int, int]]:
  """An axis as runs of blocks (start, number, length of each): whole blocks, then the rest."""
  if block_size is None or length <= block_size:
    return [(0, 1, length)]
  whole, rest = divmod(length, block_size)
  return [(0, whole, block_size)] + ([(whole * block_size, 1, rest)] if rest else [])


def _assemble(pieces: dict[tuple[int, ...], jax.Array]) -> jax.Array:
  """[slices, *size] from the regions that cover it, keyed by where each begins."""
  axes = len(next(iter(pieces)))
  for axis in reversed(range(axes)):  # join neighbours along the last axis first
    rows: dict[tuple[int, ...], list[jax.Array]] = {}
    for start in sorted(pieces):
      rows.setdefault(start[:axis], []).append(pieces[start])
    pieces = {
      start: jnp.concatenate(row, axis=axis + 1) if len(row) > 1 else row[0]
      for start, row in rows.items()
    }
  return pieces[()]


def block_paths(state: Any) -> set[str]:
  """Paths of the leaves with the stack axis first, in an optimizer's state or a tree around it."""
  found = jax.tree_util.tree_leaves_with_path(state)
  return {path_of(path) for path, _ in found if belongs_to_blocks(path)}


def belongs_to_blocks(key_path: tuple[Any, ...]) -> bool:
  """Whether this leaf of an optimizer's state has the stack axis first.

  (The key of a parameter named "blocks" is of another kind.)"""
  return jax.tree_util.GetAttrKey(FIELD) in key_path
