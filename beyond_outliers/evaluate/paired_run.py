"""A full-precision model and its quantized counterpart, run side by side, block by block.

Names of units: `layers/3/mlp/up`, `layers/3` for a block, `final_norm`, `head`.

Legend: B batch (windows), L length, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beyond_outliers.evaluate import units
from beyond_outliers.evaluate.error_sums import Sums, error_sums
from beyond_outliers.evaluate.units import Unit
from beyond_outliers.model import linears
from beyond_outliers.params import KERNEL, LAYERS, kernel_path, layer_path, slice_at, subtree
from beyond_outliers.quant.ptq.calibration import embed
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.quant.spec import LayerRecipe
from beyond_outliers.types import LanguageModel, Params


class Windows(NamedTuple):
  """A batch of token windows, [B, L] each."""

  tokens: jax.Array
  masks: tuple[jax.Array | None, jax.Array]  # segment ids where documents are kept apart; positions
  counts: jax.Array  # bool: tokens that are not padding


# Units after the blocks, and their kinds.
ENDS = {"final_norm": "norm", "head": "linear"}


class PairedRun(NamedTuple):
  """Both models, in full precision and quantized, with their parameters.

  recipe: the quantized model's."""

  models: tuple[LanguageModel, LanguageModel]
  params: tuple[Params, Params]
  recipe: Recipe

  def kinds(self) -> dict[str, str]:
    """{name: kind} of all units, in execution order."""
    c = self.models[0].config
    of_block = units.of_block(c)
    of_blocks = {
      _name(depth, path): kind for depth in range(c.blocks) for path, kind in of_block.items()
    }
    return of_blocks | ENDS

  def sums(self, batch: Windows, wanted: Collection[str]) -> dict[str, dict[str, Sums]]:
    """{name: sums of its error} of the wanted units, on the host. Memory holds one block at a time,
    and both residual streams."""
    runs = zip(self.models, self.params, strict=True)
    streams = tuple(embed(*of_run, batch.tokens) for of_run in runs)
    found: dict[str, Any] = {}
    for depth in range(self.models[0].config.blocks):
      blocks = tuple(model.block(depth) for model in self.models)
      paths, recipes, params = self._at(depth, wanted)
      sums, streams = _see_block(blocks, recipes, paths, params, streams, *batch[1:])
      # Fetching also waits for the result: otherwise all blocks would be dispatched at once.
      found |= {_name(depth, path): of_unit for path, of_unit in jax.device_get(sums).items()}
    ends = frozenset(name for name in ENDS if name in wanted)
    layer = self.recipe.layer("head")
    sums = _see_ends(self.models, layer, ends, self.params, streams, batch.counts)
    return found | jax.device_get(sums)

  def final_sums(self, batch: Windows, at: str) -> dict[str, Sums]:
    """Sums of the error at "final_norm" or "logits", from two whole forwards; on the host."""
    return jax.device_get(_see_final(self.models, at, self.params, batch))

  def spectral_ratios(self, wanted: Collection[str]) -> dict[str, float]:
    """{name: spectral ratio} of the wanted linear layers."""
    c, found = self.models[0].config, {}
    for depth in range(c.blocks):
      for path, matrices in _matrices_of_block(*self._at(depth, wanted)).items():
        found[_name(depth, path)] = matrices.spectral_ratio()
    if "head" in wanted:
      matrices = _head_matrices(c, self.params, self.recipe.layer("head"))
      found["head"] = matrices.spectral_ratio()
    return found

  def _at(self, depth: int, wanted: Collection[str]) -> tuple[Any, ...]:
    """(paths of the wanted units, recipes of the linear layers, both models' parameters) of the
    block at `depth`; the first two are static, and the same at most depths."""
    c = self.models[0].config
    paths = frozenset(path for path in units.of_block(c) if _name(depth, path) in wanted)
    recipes = tuple(
      (kind, self.recipe.layer(layer_path(depth, kind))) for kind in linears.linear_paths(c)
    )
    return paths, recipes, _slices(tuple(params[LAYERS] for params in self.params), depth)


def _name(depth: int, path: str) -> str:
  """Name of the unit at `path` in the block at `depth`; the block's own path is empty."""
  return layer_path(depth, path) if path else f"{LAYERS}/{depth}"


# Modules and recipes are static: equal ones share a compiled program.


_slices = jax.jit(slice_at)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _see_block(blocks, recipes, paths, params, streams, masks, counts_BxL):
  """({path: sums}, both residual streams after the block)."""
  calls, q_calls = (
    units.recorded(block, of_run, x_BxLxD, *masks)
    for block, of_run, x_BxLxD in zip(blocks, params, streams, strict=True)
  )
  found = {
    path: error_sums(unit, counts_BxL)
    for path, unit in units.units_of_block(calls, q_calls, dict(recipes)).items()
    if path in paths
  }
  if any(path.removeprefix("attention/") in units.OPENED for path in paths):
    opened = units.opened_attention(blocks[0].config, calls, q_calls, counts_BxL, error_sums)
    found |= {path: sums for path, sums in opened.items() if path in paths}
  return found, (calls[""].result, q_calls[""].result)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _see_ends(models, layer: LayerRecipe | None, ends, params, streams, counts_BxL):
  """{name: sums} of the final norm and of the head, window by window since logits are wide."""
  normed = tuple(final_norm(*of_run) for of_run in zip(models, params, streams, strict=True))
  found = {}
  if "final_norm" in ends:
    norm = Unit((streams[0],), (streams[1],), *normed)
    found["final_norm"] = error_sums(norm, counts_BxL)
  if "head" in ends:
    head, q_head = (
      functools.partial(_logits, *of_run) for of_run in zip(models, params, strict=True)
    )
    replay = None if layer is None else (head, q_head)
    matrices = _head_matrices(models[0].config, params, layer)

    def of_window(window):
      h, hq, counts_1xL = jax.tree.map(lambda x: x[None], window)
      return error_sums(Unit((h,), (hq,), head(h), q_head(hq), replay, matrices), counts_1xL)

    windows = jax.lax.map(of_window, (*normed, counts_BxL))
    found["head"] = jax.tree.map(lambda x: x[:, 0], windows)
  return found


@functools.partial(jax.jit, static_argnums=0)
def final_norm(model, params, x_BxLxD):
  """The head's input, from the last block's output."""
  return model.apply({"params": params}, x_BxLxD, method=lambda model, x: model.final_norm(x))


def _logits(model, params, x_BxLxD):
  return model.apply({"params": params}, x_BxLxD, method="logits")


def _head_matrices(c: Any, params, layer: LayerRecipe | None) -> units.Matrices:
  if not c.tied:
    kernel, q_kernel = (of_run["head"][KERNEL] for of_run in params)
    return units.matrices(kernel, q_kernel, layer)
  table_DxV, q_table_DxV = (of_run["embedding"].T for of_run in params)
  scale = None
  if layer is not None and layer.weights is not None and layer.weights.scale == "learned":
    scale = jnp.exp(params[1]["head_dot_general"]["log_scale"])[-1].reshape(1, 1)
  return units.matrices(table_DxV, q_table_DxV, layer, scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _see_final(models, at, params, batch):
  hidden = tuple(
    model.apply({"params": of_run}, batch.tokens, *batch.masks, method="hidden")
    for model, of_run in zip(models, params, strict=True)
  )

  def of_window(window):
    h, hq, counts_1xL = jax.tree.map(lambda x: x[None], window)
    if at == "logits":
      h, hq = (_logits(*of_run) for of_run in zip(models, params, (h, hq), strict=True))
    return error_sums(Unit((), (), h, hq), counts_1xL)

  windows = jax.lax.map(of_window, (*hidden, batch.counts))
  return jax.tree.map(lambda x: x[:, 0], windows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _matrices_of_block(paths, recipes, params):
  found = {}
  for kind, layer in recipes:
    if kind in paths:
      kernel, q_kernel = (subtree(of_run, kernel_path(kind)) for of_run in params)
      found[kind] = units.matrices(kernel, q_kernel, layer)
  return found
