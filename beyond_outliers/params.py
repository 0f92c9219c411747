"""Addresses of parameters: the grammar of paths in a tree, and the axes of each array.

A path joins the names from the root of nested dictionaries to a node by `/`. Layers are stacked:
one array holds a parameter of all depths, with the depth as first axis. So a linear layer has three
names:

  mlp/up             kind: the path within a block
  layers/mlp/up      stack: the node that holds the parameters of all depths
  layers/3/mlp/up    layer: one depth, as recipes' rules match it and `dot_general_for` takes it

A node outside the layers (`head`, `embedding`) has one name, which serves as all three. The matrix
of the linear layer at PATH is the leaf PATH/kernel.
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
FLOATS = ("float64", "float32", "float16", "bfloat16")  # types that parameters may have
_LAYER = re.compile(rf"{LAYERS}/(\d+)/(.+)")

Shapes = dict[str, tuple[tuple[int, ...], str]]  # {path: (shape, name of the dtype)}


class Axes(NamedTuple):
  """Axis numbers of a parameter, by role.

  With fan_in and fan_out: matrices; with fan_out alone: vectors; with neither: scalars."""

  batch: tuple[int, ...] = ()
  fan_in: tuple[int, ...] = ()
  fan_out: tuple[int, ...] = ()


def path_of(key_path: tuple[Any, ...]) -> str:
  """The path of a JAX key path: `layers/attention/q/kernel`."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def shapes_by_path(tree: Any, prefix: str = "") -> Shapes:
  """Shapes and types of all leaves of a tree, or of those whose paths begin with `prefix`."""
  return {
    path_of(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if path_of(path).startswith(prefix)
  }


def first_difference(have: Shapes, want: Shapes) -> str:
  """The first path at which the two differ, or that only one has; "" if there is none."""
  differing = (path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
  return min(differing, default="")


def without_empty(tree: Any) -> Any:
  """The tree as it is stored: with None in place of arrays without elements; a named tuple becomes
  a dictionary of its fields that are not None."""
  if hasattr(tree, "_asdict"):
    tree = {name: node for name, node in tree._asdict().items() if node is not None}
  return jax.tree.map(lambda x: x if x.size else None, tree)


def with_empty(stored: Any, tree: Any) -> Any:
  """The inverse of `without_empty`. tree: ShapeDtypeStructs of all arrays, with shardings."""
  if hasattr(tree, "_asdict"):
    stored = tree._replace(**stored)

  def whole(wanted, x):
    return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding) if x is None else x

  return jax.tree.map(whole, tree, stored)


def all_finite(tree: Any) -> jax.Array:
  """Whether all numbers in a tree of arrays are finite, as a scalar."""
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def mean(trees: Iterable[Any]) -> tuple[Any, int]:
  """(the mean of trees of arrays, in their types; the number of trees). Only the sum and one tree
  are in memory at a time."""
  total, count = None, 0
  for tree in trees:
    total, count = (jax.tree.map(jnp.add, total, tree) if count else tree), count + 1
  return jax.tree.map(lambda x: x / count, total), count


def parent(path: str) -> str:
  """`layers/mlp/up` for `layers/mlp/up/kernel`: a matrix's linear layer."""
  return path.rpartition("/")[0]


def kernel_path(path: str) -> str:
  """Path of the matrix of the linear layer at `path`."""
  return f"{path}/{KERNEL}"


def is_kernel(path: str) -> bool:
  return path.endswith(f"/{KERNEL}")


def is_stacked(path: str) -> bool:
  """Whether the arrays at or below `path` in a tree of parameters have the depth as first axis."""
  return path.startswith(f"{LAYERS}/")


def layer_path(depth: int, kind: str) -> str:
  """`layers/3/mlp/up` for 3 and `mlp/up`."""
  return f"{LAYERS}/{depth}/{kind}"


def at_depth(path: str, depth: int) -> str:
  """From a stack's path to a layer's: `layers/3/mlp/up` for `layers/mlp/up`; others unchanged."""
  return layer_path(depth, path.removeprefix(f"{LAYERS}/")) if is_stacked(path) else path


def stack_path(path: str) -> str:
  """From a layer's path to the stack's, the inverse of `at_depth`; others unchanged."""
  layer = _LAYER.fullmatch(path)
  return f"{LAYERS}/{layer[2]}" if layer else path


def kind_of(path: str) -> str:
  """The path within a block: `mlp/up` for `layers/3/mlp/up`; others unchanged."""
  layer = _LAYER.fullmatch(path)
  return layer[2] if layer else path


def depth_of(path: str) -> int | None:
  """3 for `layers/3/mlp/up`; None outside the layers."""
  layer = _LAYER.fullmatch(path)
  return int(layer[1]) if layer else None


def at_any_depth(path: str) -> str:
  """`layers/*/mlp/up` for `layers/3/mlp/up`; others unchanged."""
  layer = _LAYER.fullmatch(path)
  return f"{LAYERS}/*/{layer[2]}" if layer else path


def leaves_by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
  """{path: leaf} of nested dictionaries, in their order. Everything but a dictionary is a leaf,
  also a tuple of arrays."""
  leaves = {}
  for name, node in tree.items():
    if isinstance(node, Mapping):
      leaves |= {f"{name}/{path}": leaf for path, leaf in leaves_by_path(node).items()}
    else:
      leaves[name] = node
  return leaves


def float_type(dtype: Any) -> np.dtype:
  """One of FLOATS as a numpy dtype. Errors: ConfigError for any other, or one that JAX narrows."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:  # not a type's name
    found = np.dtype(object)
  require(found.name in FLOATS, "dtype", str(dtype), f"expected one of {', '.join(FLOATS)}")
  remedy = "JAX has this type only under jax_enable_x64; set that, or use float32"
  require(jax.dtypes.canonicalize_dtype(found) == found, "dtype", found.name, remedy)
  return found


def check_floats(tree: Mapping[str, Any]) -> None:
  """Refuses leaves that are not arrays of FLOATS in native byte order: a compiled program would
  read swapped bytes as native ones (findings/jit_reads_swapped_bytes.sh).

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
  """Refuses parameters that are not a model's, naming the first path that differs. They may include
  the learned scales of a model trained quantized.

  Errors: ConfigError."""
  plain, tokens = model.clone(dot_general_for=None), np.zeros((1, 1), np.int32)
  # Unboxed inside the trace: under a mesh, unboxing does not work on bare shapes.
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
  """The node at `path`. Errors: KeyError if there is none."""
  return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def with_leaves(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with the leaves at these paths replaced or added."""
  return tree_of({**leaves_by_path(tree), **leaves})


def slice_at(stack: Any, depth: Any) -> Any:
  """One depth of a tree of stacked arrays."""
  return jax.tree.map(lambda x: x[depth], stack)
