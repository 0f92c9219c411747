"""Metrics of an optimizer's state, and of the change that it makes to the parameters."""

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

# Field of a bucket's state -> the function that reduces the values of all blocks to one.
REDUCTIONS = {"kept": jnp.sum, "age": max_or_nan, "residual": max_or_nan, "condition": max_or_nan}


def of_state(opt_state: Any) -> Metrics:
  """Metrics over all roots, bases or factors of a preconditioner. Free: the state holds them.

  roots/kept: how many were refused so far (old ones kept), being not finite or of too large a
  residual. roots/age: steps since the oldest in use was computed. roots/residual, roots/condition:
  the largest among those computed last."""
  found: dict[str, list[jax.Array]] = {}
  for field, _, x in _kept_in(opt_state):
    found.setdefault(field, []).append(REDUCTIONS[field](x))
  return {f"roots/{field}": REDUCTIONS[field](jnp.stack(values)) for field, values in found.items()}


def paths_of_state(opt_state: Any) -> list[str]:
  """Paths of the arrays that `of_state` reads and on which nothing else depends."""
  return [path for _, path, _ in _kept_in(opt_state)]


def _kept_in(opt_state: Any) -> Iterator[tuple[str, str, Any]]:
  """(field, path, array) of every array in the state that holds metrics."""
  for path, x in jax.tree_util.tree_leaves_with_path(opt_state):
    field = getattr(path[-1], "name", None)
    if field in REDUCTIONS and blocks.belongs_to_blocks(path) and x.size:
      yield field, path_of(path), x


def of_update(update: Params, labels: Any, axes: AxesTree = None) -> Metrics:
  """Metrics of a change of the parameters, by group: update_rms/<group>, and the largest spectral
  norm of the group's matrices, update_spectral_norm/<group>.

  update, labels: trees like the parameters. Spectral norms are estimated from below, by power
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
