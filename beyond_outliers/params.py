"""Addresses of parameters: the grammar of paths in a tree, and the axes of each array.

A path joins by `/` the names that lead from the root to a node of nested dictionaries. Layers are
stacked: one array holds a parameter of every depth, depth first. So a linear layer has three names:

  mlp/up             kind: the path within a block
  layers/mlp/up      stack: the node that holds the parameters of all depths
  layers/3/mlp/up    layer: one depth, as rules of recipes match it and `dot_general_for` takes it

A node outside the layers (`head`, `embedding`) has one name, which is all three. The matrix of the
linear layer at PATH is the leaf PATH/kernel.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.config.checks import require

LAYERS, KERNEL, LOG_SCALE = "layers", "kernel", "log_scale"
FLOATS = ("float64", "float32", "float16", "bfloat16")  # that parameters may have
_LAYER = re.compile(rf"{LAYERS}/(\d+)/(.+)")

Shapes = dict[str, tuple[tuple[int, ...], str]]  # {path: (shape, name of the dtype)}


class Axes(NamedTuple):
  """Axis numbers of a parameter by role.

  fan_in and fan_out: matrices; fan_out alone: vectors; neither: scalars."""

  batch: tuple[int, ...] = ()
  fan_in: tuple[int, ...] = ()
  fan_out: tuple[int, ...] = ()


def path_of(key_path: tuple[Any, ...]) -> str:
  """The path of a JAX key path: `layers/attention/q/kernel`."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def shapes_by_path(tree: Any, prefix: str = "") -> Shapes:
  """Of every leaf of a tree, or of those whose paths begin with `prefix`."""
  return {
    path_of(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if path_of(path).startswith(prefix)
  }


def first_difference(have: Shapes, want: Shapes) -> str:
  """The first path whose arrays differ, or that only one has; none: nothing."""
  differing = (path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
  return min(differing, default="")


def without_empty(tree: Any) -> Any:
  """The tree as it is stored: None in the place of arrays that have no elements; of a named tuple a
  dictionary of its fields, without those that are None."""
  if hasattr(tree, "_asdict"):
    tree = {name: node for name, node in tree._asdict().items() if node is not None}
  return jax.tree.map(lambda x: x if x.size else None, tree)


def with_empty(stored: Any, tree: Any) -> Any:
  """The inverse of `without_empty`. tree: ShapeDtypeStructs with shardings, of all arrays."""
  if hasattr(tree, "_asdict"):
    stored = tree._replace(**stored)

  def whole(wanted, x):
    return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding) if x is None else x

  return jax.tree.map(whole, tree, stored)


def all_finite(tree: Any) -> jax.Array:
  """Whether all numbers in a tree of arrays are finite, a scalar."""
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def mean(trees: Iterable[Any]) -> tuple[Any, int]:
  """(the mean of trees of arrays, in their types; how many these are). One is held at a time."""
  total, count = None, 0
  for tree in trees:
    total, count = (jax.tree.map(jnp.add, total, tree) if count else tree), count + 1
  return jax.tree.map(lambda x: x / count, total), count


def parent(path: str) -> str:
  """`layers/mlp/up` of `layers/mlp/up/kernel`: of a matrix, its linear layer."""
  return path.rpartition("/")[0]


def kernel_path(path: str) -> str:
  """The matrix of the linear layer at `path`."""
  return f"{path}/{KERNEL}"


def is_kernel(path: str) -> bool:
  return path.endswith(f"/{KERNEL}")


def is_stacked(path: str) -> bool:
  """Whether arrays at or below `path`, of a tree of parameters, have the depth as first axis."""
  return path.startswith(f"{LAYERS}/")


def layer_path(depth: int, kind: str) -> str:
  """`layers/3/mlp/up` of 3 and `mlp/up`."""
  return f"{LAYERS}/{depth}/{kind}"


def at_depth(path: str, depth: int) -> str:
  """The layer's path of a stack's: `layers/3/mlp/up` of `layers/mlp/up`; others as they are."""
  return layer_path(depth, path.removeprefix(f"{LAYERS}/")) if is_stacked(path) else path


def stack_path(path: str) -> str:
  """The stack's path of a layer's, the inverse of `at_depth`; others as they are."""
  layer = _LAYER.fullmatch(path)
  return f"{LAYERS}/{layer[2]}" if layer else path


def kind_of(path: str) -> str:
  """The path within a block: `mlp/up` of `layers/3/mlp/up`; others as they are."""
  layer = _LAYER.fullmatch(path)
  return layer[2] if layer else path


def depth_of(path: str) -> int | None:
  """3 of `layers/3/mlp/up`; None outside the layers."""
  layer = _LAYER.fullmatch(path)
  return int(layer[1]) if layer else None


def at_any_depth(path: str) -> str:
  """`layers/*/mlp/up` of `layers/3/mlp/up`; others as they are."""
  layer = _LAYER.fullmatch(path)
  return f"{LAYERS}/*/{layer[2]}" if layer else path


def leaves_by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
  """{path: leaf} of nested dictionaries, in their order. Leaf: all that is no dictionary, so that a
  tuple of arrays is one."""
  leaves = {}
  for name, node in tree.items():
    if isinstance(node, Mapping):
      leaves |= {f"{name}/{path}": leaf for path, leaf in leaves_by_path(node).items()}
    else:
      leaves[name] = node
  return leaves


def float_type(dtype: Any) -> np.dtype:
  """One of FLOATS, as numpy has it. Errors: ConfigError for another, or one that jax narrows."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:  # a name of nothing
    found = np.dtype(object)
  require(found.name in FLOATS, "dtype", str(dtype), f"expected one of {', '.join(FLOATS)}")
  remedy = "JAX has this type only under jax_enable_x64; set that, or use float32"
  require(jax.dtypes.canonicalize_dtype(found) == found, "dtype", found.name, remedy)
  return found


def check_floats(tree: Mapping[str, Any]) -> None:
  """Refusal of leaves that are no arrays of FLOATS in this machine's order of bytes: a compiled
  program takes the other one for it (findings/jit_reads_swapped_bytes.sh).

  Errors: ConfigError."""
  require(
    isinstance(tree, Mapping), "params", type(tree).__name__, "give the model's tree of parameters"
  )
  for path, leaf in leaves_by_path(tree).items():
    dtype = getattr(leaf, "dtype", None)
    require(
      dtype is not None and dtype.name in FLOATS and np.dtype(dtype).isnative,
      f"params: {path}",
      type(leaf).__name__ if dtype is None else str(dtype),
      f"expected an array of {', '.join(FLOATS)}, in native byte order; convert it",
    )


def check_params(model: Any, params: Mapping[str, Any]) -> None:
  """Refusal of parameters that are not those of a model, by the first path that differs. Scales
  that a model trained quantized has learned may be among them.

  Errors: ConfigError."""
  plain, tokens = model.clone(dot_general_for=None), np.zeros((1, 1), np.int32)
  # Unboxed where it is traced: it may be under a mesh, which takes no shapes alone.
  shapes = jax.eval_shape(lambda: nn.unbox(plain.init(jax.random.key(0), tokens)["params"]))
  found, expected = (
    {path: str(getattr(leaf, "shape", type(leaf).__name__)) for path, leaf in leaves.items()}
    for leaves in (leaves_by_path(params), leaves_by_path(shapes))
  )
  for path in sorted(expected.keys() | found.keys()):
    here, there = (leaves.get(path, "absent") for leaves in (found, expected))
    require(
      here == there or path.endswith(f"/{LOG_SCALE}"),
      f"params: {path}",
      here,
      f"model.config makes it {there}; give the parameters of this model, unboxed",
    )


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries, the inverse of `leaves_by_path`."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *names, last = path.split("/")
    node = functools.reduce(lambda node, name: node.setdefault(name, {}), names, tree)
    node[last] = leaf
  return tree


def subtree(tree: Any, path: str) -> Any:
  """The node at `path`. Errors: KeyError where there is none."""
  return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def with_leaves(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with other leaves, or further ones, at these paths."""
  return tree_of({**leaves_by_path(tree), **leaves})


def slice_at(stack: Any, depth: Any) -> Any:
  """The arrays of one depth of stacked ones."""
  return jax.tree.map(lambda x: x[depth], stack)
