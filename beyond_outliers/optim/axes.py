"""Leaves as batches of matrices, vectors or scalars, by the meaning of their axes, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.config.checks import require
from beyond_outliers.params import Axes, path_of

AxesTree = Any  # a tree of `Axes` like the parameters, or params -> such a tree, or None


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter as `slices` matrices, vectors or scalars of equal size; whatever an optimizer
  does "per parameter", it does per slice."""

  path: str
  shape: tuple[int, ...]
  order: tuple[int, ...]  # the leaf's axes: first the batch axes, then those of a slice
  slices: int
  size: tuple[int, ...]  # of a slice: (rows, columns), (length,), or () for scalars
  fan_in_axis: int | None  # of a slice: 0 or 1 for matrices, None for the others

  @property
  def is_matrix(self) -> bool:
    return len(self.size) == 2

  @property
  def fan_in(self) -> int:
    return self.size[self.fan_in_axis] if self.fan_in_axis is not None else 1

  @property
  def fan_out(self) -> int:
    return math.prod(self.size) // self.fan_in

  def split(self, x: jax.Array) -> jax.Array:
    """[slices, *size]; a slice keeps the leaf's order of axes: [in, out] is not transposed."""
    return jnp.transpose(x, self.order).reshape(self.slices, *self.size)

  def join(self, y: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    inverse = tuple(self.order.index(axis) for axis in range(len(self.order)))
    return jnp.transpose(y.reshape(tuple(self.shape[axis] for axis in self.order)), inverse)


def leaves(tree: Any, axes: AxesTree = None) -> tuple[Leaf, ...]:
  """A `Leaf` for each leaf of `tree` (arrays or shapes), in order; none for optax.MaskedNode.

  Without axes, a leaf of at most one axis is a vector; of any other, the last two axes are (fan-in,
  fan-out) and the rest batch.
  Errors: ValueError for a leaf that `axes` lack, or not all of whose axes are named exactly once;
    those of `check_floating`."""
  check_floating(tree)
  axes = axes(tree) if callable(axes) else axes
  given = None
  if axes is not None:
    of_leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, Axes))
    given = {path_of(path): of_leaf for path, of_leaf in of_leaves}
  return tuple(
    _leaf(path_of(path), tuple(x.shape), given)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  )


def check_floating(tree: Any) -> None:
  """Refuses leaves that no optimizer can update: integers would come back rounded, complex numbers
  without their imaginary part.

  Errors: ConfigError naming the leaf and its type."""
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    dtype = getattr(x, "dtype", None)
    require(
      dtype is not None and jnp.issubdtype(dtype, jnp.floating),
      f"parameter {path_of(path)!r}",
      type(x).__name__ if dtype is None else str(dtype),
      "expected an array of real floating-point numbers; leave others out with optax.masked or "
      "optax.partition",
    )


def by_kind(
  axes: AxesTree, *, matrix: optax.GradientTransformation, other: optax.GradientTransformation
) -> optax.GradientTransformation:
  """One transformation for leaves of matrices, another for leaves of vectors or scalars."""

  def labels(params):
    kinds = ["matrix" if leaf.is_matrix else "other" for leaf in leaves(params, axes)]
    return jax.tree.unflatten(jax.tree.structure(params), kinds)

  return optax.partition({"matrix": matrix, "other": other}, labels)


def matrix_mask(axes: AxesTree) -> Callable[[Any], Any]:
  """A `mask` for optax: params -> a tree of whether each leaf consists of matrices."""
  return lambda params: jax.tree.unflatten(
    jax.tree.structure(params), [leaf.is_matrix for leaf in leaves(params, axes)]
  )


def _leaf(path: str, shape: tuple[int, ...], given: dict[str, Axes] | None) -> Leaf:
  ndim = len(shape)
  if given is None and ndim < 2:
    axes = Axes((), (), tuple(range(ndim)))
  elif given is None:
    axes = Axes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))
  elif path in given:
    parts = (tuple(axis + ndim if axis < 0 else axis for axis in part) for part in given[path])
    axes = Axes(*parts)
  else:
    raise ValueError(f"axes: parameter {path!r} has none; they are given for {sorted(given)}")
  if sorted(axes.batch + axes.fan_in + axes.fan_out) != list(range(ndim)) or (
    axes.fan_in and not axes.fan_out
  ):
    raise ValueError(
      f"axes of {path!r} = {axes}: expected each axis of shape {shape} once, and fan_in only "
      "together with fan_out"
    )
  # The slice keeps its axes in the leaf's order.
  groups = sorted(group for group in (axes.fan_in, axes.fan_out) if group)
  size = tuple(math.prod(shape[axis] for axis in group) for group in groups)
  order = axes.batch + tuple(axis for group in groups for axis in group)
  fan_in_axis = groups.index(axes.fan_in) if axes.fan_in else None
  return Leaf(path, shape, order, math.prod(shape[axis] for axis in axes.batch), size, fan_in_axis)
