"""Refusals of bad input to post-training quantization, which codes would hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.config.checks import require
from beyond_outliers.params import (
  FLOATS,
  at_depth,
  check_floats,
  check_params,
  is_stacked,
  leaves_by_path,
)
from beyond_outliers.quant.dot import trained_under
from beyond_outliers.quant.ptq.calibration import Batch, Inputs
from beyond_outliers.quant.ptq.methods import Method
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.quant.recipes import Recipe
from beyond_outliers.quant.spec import LayerRecipe
from beyond_outliers.types import Array, LanguageModel, Params

NEAREST = Method()  # the rounding that training under a recipe computes with


def check_batches(batches: Sequence[Batch], method: str, vocab: int) -> None:
  """Refuses missing or empty batches, and tokens that the model does not know.

  Errors: ConfigError, as for all checks below."""
  require(
    sum(np.size(batch["tokens"]) for batch in batches) > 0,
    "calibration_batches",
    batches,
    f"{method} looks at the inputs of every layer; give it some tokens",
  )
  for batch in batches:
    check_tokens(batch["tokens"], vocab, "calibration_batches")


def check_model(model: LanguageModel, params: Params, recipe: Recipe, how: Method) -> None:
  """Refuses a model that was trained under another quantization than this one, and parameters of
  another model. params: arrays or their shapes."""
  for path in model.contractions():
    trained = trained_under(model, path)
    same = isinstance(trained, LayerRecipe) and NEAREST.layer(trained) == how.layer(
      recipe.layer(path)
    )
    require(
      trained is None or (same and how == NEAREST),
      f"model: {path}",
      "trained under another quantization",
      "give its own recipe, quant.recipes.from_config(run.config.quant), and the method 'rtn', or "
      "give model.clone(dot_general_for=None) to quantize its float weights anew",
    )
  check_params(model, params)


def check_tokens(tokens: Array, vocab: int, field: str) -> None:
  """Refuses tokens that the model does not know."""
  tokens = np.asarray(tokens)
  for extreme in (tokens.min(initial=0), tokens.max(initial=0)):
    require(
      0 <= extreme < vocab,
      field,
      int(extreme),
      f"the model knows tokens below {vocab}; use those of its tokenizer",
    )


def check_parameters(params: Params) -> None:
  """Refuses, by path, parameters that are not floats or not finite."""
  require(
    isinstance(params, Mapping),
    "params",
    type(params).__name__,
    "give the model's tree of parameters",
  )
  leaves = leaves_by_path(params)
  whole = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, QuantizedMatrix)}
  check_floats(whole)
  finite = {path: _finite(leaf, is_stacked(path)) for path, leaf in whole.items()}
  for path, of_leaf in finite.items():
    bad = np.flatnonzero(~np.asarray(of_leaf))
    depth = int(bad[0]) if bad.size else 0
    require(
      not bad.size,
      f"params: {at_depth(path, depth)}",
      "not finite",
      "NaN or infinity, which codes would hide; use another checkpoint",
    )


def check_quantized(params: Params) -> None:
  """Refuses the same in a quantized model, whose scales count as parameters."""
  leaves = leaves_by_path(params)
  matrices = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedMatrix)}
  parts = {
    f"{path}/{name}": part
    for path, matrix in matrices.items()
    for name, part in matrix._asdict().items()
    if part is not None and (name != "codes" or part.dtype.name in FLOATS)  # not quantized
  }
  check_parameters({**leaves, **parts})


def check_inputs(path: str, inputs: Inputs) -> None:
  """Refuses statistics of a layer's inputs that are not finite."""
  require(
    all(bool(jnp.isfinite(statistic).all()) for statistic in jax.tree.leaves(inputs)),
    f"calibration_batches: {path}",
    "not finite",
    "the layer's inputs overflow or are NaN; check the checkpoint, or the tokens",
  )


@jax.jit
def _finite_everywhere(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


@jax.jit
def _finite_by_depth(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def _finite(x: jax.Array, stacked: bool) -> jax.Array:
  return _finite_by_depth(x) if stacked else _finite_everywhere(x)
