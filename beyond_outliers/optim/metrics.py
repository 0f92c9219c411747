"""Metrics of an optimizer's state, and of the change of the parameters that it made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from beyond_outliers.ops.extremes import max_magnitude, max_or_nan
from beyond_outliers.optim import blocks
from beyond_outliers.optim.axes import AxesTree, leaves
from beyond_outliers.optim.linalg.spectral_norm import spectral_norm
from beyond_outliers.params import path_of
from beyond_outliers.types import Metrics, Params

# Field of a bucket's state -> how the values of all blocks become one.
REDUCTIONS = {"kept": jnp.sum, "age": max_or_nan, "residual": max_or_nan, "condition": max_or_nan}


def of_state(opt_state: Any) -> Metrics:
  """Metrics of all roots, bases or factors of a preconditioner. Free: the state holds them.

  roots/kept: refused so far, since not finite or of too large a residual. roots/age: of the oldest
  in use, steps. roots/residual, roots/condition: the largest, of the last ones computed."""
  found: dict[str, list[jax.Array]] = {}
  for field, _, x in _kept_in(opt_state):
    found.setdefault(field, []).append(REDUCTIONS[field](x))
  return {f"roots/{field}": REDUCTIONS[field](jnp.stack(values)) for field, values in found.items()}


def paths_of_state(opt_state: Any) -> list[str]:
  """Paths of what `of_state` reads: of arrays that nothing else depends on."""
  return [path for _, path, _ in _kept_in(opt_state)]


def _kept_in(opt_state: Any) -> Iterator[tuple[str, str, Any]]:
  """(field, path, array) of the arrays that are metrics."""
  for path, x in jax.tree_util.tree_leaves_with_path(opt_state):
    field = getattr(path[-1], "name", None)
    if field in REDUCTIONS and blocks.belongs_to_blocks(path) and x.size:
      yield field, path_of(path), x


def of_update(update: Params, labels: Any, axes: AxesTree = None) -> Metrics:
  """Metrics of the change of the parameters, by group: update_rms/<group>, and
  update_spectral_norm/<group> of its largest matrix.

  update, labels: trees like the parameters. The spectral norms are estimated, from below, by power
    iteration."""
  squares: dict[str, Any] = {}
  sizes: dict[str, int] = {}
  norms: dict[str, list[jax.Array]] = {}
  for x, label, leaf in zip(
    jax.tree.leaves(update), jax.tree.leaves(labels), leaves(update, axes), strict=True
  ):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares[label] = squares.get(label, 0) + jnp.sum(x * x)
    sizes[label] = sizes.get(label, 0) + x.size
    if leaf.is_matrix and x.size:
      norms.setdefault(label, []).append(max_magnitude(spectral_norm(leaf.split(x))))
  rms = {f"update_rms/{label}": jnp.sqrt(squares[label] / sizes[label]) for label in squares}
  largest = {
    f"update_spectral_norm/{label}": max_magnitude(jnp.stack(values))
    for label, values in norms.items()
  }
  return {**rms, **largest}
