"""The linear layers of a model: their paths, contraction widths and parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from beyond_outliers import config
from beyond_outliers.params import KERNEL, LAYERS, layer_path, subtree
from beyond_outliers.types import Params


def linear_paths(c: config.Model) -> list[str]:
  """The kinds of linear layers in a block: their paths after `layers/<depth>/`."""
  mlp = ["mlp/up", "mlp/gate", "mlp/down"] if c.mlp == "swiglu" else ["mlp/up", "mlp/down"]
  return ["attention/q", "attention/k", "attention/v", "attention/o", *mlp]


def contractions(c: config.Model) -> dict[str, tuple[int, bool]]:
  """Linear layers by path: (contraction width, whether mesh axis `model` splits it)."""
  inputs = {"attention/o": (c.heads * c.d_head, True), "mlp/down": (c.mlp_hidden, True)}
  of_blocks = {
    layer_path(depth, kind): inputs.get(kind, (c.d_model, False))
    for depth in range(c.blocks)
    for kind in linear_paths(c)
  }
  return {**of_blocks, "head": (c.d_model, False)}


class Linears(NamedTuple):
  """All linear layers of one kind."""

  paths: tuple[str, ...]  # as `dot_general_for` takes them, by depth
  kernels: jax.Array  # [depths, two axes of a matrix]
  axis: int  # a matrix's axis that is summed over
  own: Params  # parameters of their dot_generals, depth first


def linears(c: config.Model, params: Params) -> dict[str, Linears]:
  """The linear layers of a model by kind, `attention/q` to `mlp/down` and `head`."""
  own, found = of_dot_generals(c, params), {}
  for kind in linear_paths(c):
    paths = tuple(layer_path(depth, kind) for depth in range(c.blocks))
    kernels = subtree(params[LAYERS], kind)[KERNEL]
    found[kind] = Linears(paths, kernels, 0, own.get(kind))
  kernel, axis = (params["embedding"], 1) if c.tied else (params["head"][KERNEL], 0)
  of_head = jax.tree.map(lambda x: x[None], own.get("head"))
  return {**found, "head": Linears(("head",), kernel[None], axis, of_head)}


def of_dot_generals(c: config.Model, tree: Params) -> dict[str, Any]:
  """The variables of dot_generals by kind, from a tree like the parameters or from a collection
  that was sown; kinds whose dot_general has none are left out."""
  found = {}
  for kind in linear_paths(c):
    found[kind] = _node(tree.get(LAYERS, {}), kind)
  found["head"] = tree.get("head", {})
  own = {
    kind: [node for name, node in linear.items() if name != KERNEL]
    for kind, linear in found.items()
  }
  if "head_dot_general" in tree:
    own["head"] = [tree["head_dot_general"]]
  return {kind: nodes[0] for kind, nodes in own.items() if nodes}


def _node(tree: Params, path: str) -> Params:
  """The node at `path`, or an empty one."""
  try:
    return subtree(tree, path)
  except KeyError:
    return {}
