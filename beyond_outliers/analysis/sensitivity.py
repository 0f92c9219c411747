"""Sensitivity of a quantized network to its parts: quantizing each one alone, and all but each.

Legend: B batch (windows), L length, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from beyond_outliers.config.checks import require
from beyond_outliers.evaluate.error_sums import error_sums, jackknife
from beyond_outliers.evaluate.paired_run import PairedRun, Windows, final_norm
from beyond_outliers.evaluate.propagation import Tokens, paired, windows
from beyond_outliers.evaluate.units import Unit
from beyond_outliers.model import linears
from beyond_outliers.model.loss import cross_entropy
from beyond_outliers.params import (
  KERNEL,
  LAYERS,
  depth_of,
  kernel_path,
  kind_of,
  layer_path,
  slice_at,
  subtree,
  with_leaves,
)
from beyond_outliers.quant import QuantizedModel, dot_general_for, qmatrix
from beyond_outliers.quant.ptq.calibration import embed, run_block
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.quant.spec import LayerRecipe
from beyond_outliers.types import LanguageModel, Params

Recipes = dict[str, LayerRecipe]  # path -> recipe, of the linear layers that are quantized
Split = dict[str, tuple[Recipes, Recipes]]  # part -> (it alone, all but it)


def _split(recipes: Recipes, name_of: Callable[[str], str]) -> Split:
  """Parts that consist of whole linear layers; `name_of` maps a layer's path to its part."""
  parts: Split = {}
  for path, layer in recipes.items():
    alone, without = parts.setdefault(name_of(path), ({}, dict(recipes)))
    alone[path] = layer
    del without[path]
  return parts


def _block_of(path: str) -> str:
  depth = depth_of(path)
  return path if depth is None else f"{LAYERS}/{depth}"


def _operands(recipes: Recipes) -> Split:
  """Two parts, all weights and all activations: each is all but the other."""
  only = {
    kept: {
      path: LayerRecipe(**{kept: getattr(layer, kept)})
      for path, layer in recipes.items()
      if getattr(layer, kept) is not None
    }
    for kept in ("weights", "activations")
  }
  return {
    "weights": (only["weights"], only["activations"]),
    "activations": (only["activations"], only["weights"]),
  }


# What is a part: one linear layer, all of a kind, those of a block, or one operand of all layers.
PARTS: dict[str, Callable[[Recipes], Split]] = {
  "module": functools.partial(_split, name_of=str),
  "kind": functools.partial(_split, name_of=kind_of),
  "block": functools.partial(_split, name_of=_block_of),
  "operand": _operands,
}


def sensitivity(
  model: LanguageModel,
  params: Params,
  quantized: QuantizedModel,
  batches: Iterable[Tokens],
  *,
  by: str = "module",
  mask_documents: bool = False,
) -> pd.DataFrame:
  """Table of error and loss with one part quantized, and with all but one, the worst part first.

  Columns: name; R_alone and cost_alone, with only this part quantized; R_without and cost_without,
  with all but this part; a `_se` of each, over windows. The row "all" is of the whole quantized
  model; its `without` is the full-precision model.
  R: at the final norm, as `final_error`. cost: next-token loss within windows, less that of full
  precision, nats per token; its standard error is of the differences by window.
  Matrices are those of `quantized`: GPTQ's corrections for errors of earlier layers stay in them.
  by: a row of PARTS. All else: as for `decompose`.
  Errors: ConfigError, as `decompose`."""
  require(by in PARTS, "by", by, "expected one of " + ", ".join(map(repr, PARTS)))
  run = paired(model, params, quantized)
  recipes = {
    path: layer
    for path in run.models[0].contractions()
    if (layer := quantized.recipe.layer(path)) is not None
  }
  splits = {"all": (recipes, Recipes()), **PARTS[by](recipes)}
  # Keyed by recipes, so that equal variants run once: of two parts, one alone is all but the other.
  variants = {_key(of): _Variant(run, of) for split in splits.values() for of in split}
  found: dict[Any, list[Any]] = {key: [] for key in variants}
  for batch in windows(batches, model.config.vocab, mask_documents):
    reference = variants[_key(Recipes())].outputs(batch)
    for key, variant in variants.items():
      found[key].append(jax.device_get(_sums(variant.outputs(batch), reference, batch.counts)))
  sums = {key: jax.tree.map(lambda *x: np.concatenate(x), *parts) for key, parts in found.items()}
  table = pd.DataFrame(
    {"name": name, **_columns(*(sums[_key(of)] for of in split))} for name, split in splits.items()
  )
  return table.sort_values("R_alone", ascending=False, ignore_index=True)


def _key(recipes: Recipes) -> frozenset[tuple[str, LayerRecipe]]:
  return frozenset(recipes.items())


def _columns(alone: Any, without: Any) -> dict[str, float]:
  found = {}
  for name, sums in (("alone", alone), ("without", without)):
    for column, numerator, denominator in (("R", "R", "out"), ("cost", "cost", "targets")):
      value, error = jackknife(sums, lambda s, a=numerator, b=denominator: s[a] / s[b])
      found |= {f"{column}_{name}": float(value), f"{column}_{name}_se": float(error)}
  return found


class _Variant:
  """The network with these linear layers quantized, and the others in full precision."""

  def __init__(self, run: PairedRun, recipes: Recipes):
    rules = tuple((re.escape(path), layer) for path, layer in recipes.items())
    self._run, self._recipes, self._plain = run, recipes, run.models[0]
    self._model = self._plain.clone(
      dot_general_for=dot_general_for(Recipe((*rules, (".*", None))), "jax")
    )

  def outputs(self, batch: Windows) -> tuple[jax.Array, jax.Array]:
    """(the final norm's output, [B, L, D]; each window's summed loss, [B])."""
    stacks, ends = tuple(params[LAYERS] for params in self._run.params), self._run.params[0]
    x_BxLxD = embed(self._plain, ends, batch.tokens)
    for depth in range(self._plain.config.blocks):
      recipes = tuple(
        (kind, self._recipes.get(layer_path(depth, kind)))
        for kind in linears.linear_paths(self._plain.config)
      )
      tree = _mixed_block(recipes, stacks, depth)
      x_BxLxD = run_block(self._model.block(depth), tree, x_BxLxD, *batch.masks)
    x_BxLxD = final_norm(self._plain, ends, x_BxLxD)
    return x_BxLxD, _losses(*self._head(), x_BxLxD, batch.tokens, batch.counts)

  def _head(self) -> tuple[LanguageModel, Params]:
    """A model and parameters with this variant's head: unless the head is quantized, the plain
    ones, whose compiled programs all variants share."""
    layer, (params, q_params) = self._recipes.get("head"), self._run.params
    if layer is None:
      return self._plain, params
    if "head" not in q_params:  # tied
      return self._model, q_params
    kernel = _mixed(layer, params["head"][KERNEL], q_params["head"][KERNEL])
    return self._model, with_leaves(q_params, {kernel_path("head"): kernel})


def _mixed(layer: LayerRecipe | None, kernel: jax.Array, q_kernel: Any) -> Any:
  """The matrix of a linear layer under this recipe, from the two models' matrices."""
  if layer is None:
    return kernel
  if layer.weights is None and isinstance(q_kernel, QuantizedMatrix):
    values = qmatrix.in_quantized_basis(kernel, layer, q_kernel.smooth)
    return QuantizedMatrix(values, jnp.ones((1, 1), values.dtype), q_kernel.smooth)
  return q_kernel


# Modules and recipes are static: equal ones share a compiled program.


@functools.partial(jax.jit, static_argnums=0)
def _mixed_block(recipes, stacks, depth):
  """The parameters of a block in which some linear layers are quantized."""
  tree, q_tree = slice_at(stacks, depth)
  kernels = {
    kernel_path(kind): _mixed(layer, *(subtree(t, kernel_path(kind)) for t in (tree, q_tree)))
    for kind, layer in recipes
  }
  return with_leaves(q_tree, kernels)


@functools.partial(jax.jit, static_argnums=0)
def _losses(model, params, x_BxLxD, tokens_BxL, counts_BxL):
  def of_window(window):  # one window at a time, since logits are wide
    x_LxD, tokens_L, counts_L = window
    logits_LxV = model.apply({"params": params}, x_LxD, method="logits")
    return jnp.sum(cross_entropy(logits_LxV[:-1], tokens_L[1:]), where=counts_L[1:])

  return jax.lax.map(of_window, (x_BxLxD, tokens_BxL, counts_BxL))


@jax.jit
def _sums(outputs, reference, counts_BxL):
  """Sums of R and of the cost per window, [B] each."""
  (x_BxLxD, loss_B), (plain_BxLxD, plain_loss_B) = outputs, reference
  found = error_sums(Unit((), (), plain_BxLxD, x_BxLxD), counts_BxL)["token"]
  return {**found, "cost": loss_B - plain_loss_B, "targets": jnp.sum(counts_BxL[:, 1:], axis=1)}
