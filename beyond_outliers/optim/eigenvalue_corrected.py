"""Eigenvalue-corrected Shampoo (Meta's; arXiv 2506.03595): like SOAP, Adam in the eigenbasis of the
factors.

Unlike SOAP it starts in the identity basis instead of skipping a step, renews a basis before using
it, by a full eigendecomposition, and leaves the second moment alone when the basis changes.

Legend: B blocks on this device, D the axis of a basis.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.config.optimizers import Shampoo
from beyond_outliers.ops import linalg
from beyond_outliers.optim import blocks, blockwise, factored, factory
from beyond_outliers.optim.axes import AxesTree
from beyond_outliers.optim.eigenbasis import (
  Arrays,
  BlocksState,
  accumulate_factors,
  change_bases,
  first_state,
  grown_older,
  rotate_block,
)
from beyond_outliers.optim.refresh import REFRESHES


@factory.arguments_of(
  Shampoo, without=("learning_rate", "weight_decay"), eigenvalue_correction=True
)
def scale_by_eigenvalue_corrected_shampoo(
  h: Shampoo, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Direction of eigenvalue-corrected Shampoo, to be subtracted.

  Reference: facebookresearch/optimizers, EigenvalueCorrectedShampooPreconditionerList with eigh.

  b2 is the decay of both factors and second moment; eps is added to the power of the bias-corrected
  second moment. Until start_step this is Adam. Hyperparameters of roots and grafting are not read.
  State: that of `soap`, and a factor for vectors too."""
  return direction(h, axes, mesh)


def direction(
  h: Shampoo, axes: AxesTree, mesh: jax.sharding.Mesh | None
) -> optax.GradientTransformation:
  if h.exponent is None:
    h = dataclasses.replace(h, exponent=0.5)
  return blockwise.transformation(
    h,
    functools.partial(factored.layout, h=h, axes=axes, mesh=mesh),
    _init_bucket,
    _step,
    traced=("b1", "b2", "eps", "exponent"),
    constants=blocks.Layout.block_ids,
  )


def _init_bucket(h: Shampoo, bucket: blocks.Bucket, dtype: np.dtype) -> BlocksState:
  return first_state(bucket, factored.factored_axes(h, bucket.shape), dtype)


def _step(
  h: Shampoo, t: jax.Array, g: jax.Array, s: BlocksState, id_B: jax.Array
) -> tuple[jax.Array, BlocksState]:
  """Renews the bases, then takes Adam's direction in them."""
  axes = factored.factored_axes(h, g.shape[1:])
  # A decay of 1 means a sum instead of an average, without bias correction.
  weight = jnp.where(h.b2 < 1, 1 - h.b2, 1)
  factors = accumulate_factors(s.factors, g, axes, h.b2, weight)
  s = s._replace(factors=())
  if axes:
    s = _refresh_bases(h, t, axes, s, factors, id_B)

  seen = rotate_block(g, s.bases, axes)
  momentum = h.b1 * s.momentum + (1 - h.b1) * seen
  second_moment = h.b2 * s.second_moment + weight * seen * seen
  assert h.exponent is not None
  divisor = (second_moment / factored.bias_correction(h, h.b2, t)) ** h.exponent + h.eps
  adam = momentum / factored.bias_correction(h, h.b1, t) / divisor
  s = s._replace(momentum=momentum, second_moment=second_moment, factors=factors)
  return rotate_block(adam, s.bases, axes, back=True), s


def _refresh_bases(
  h: Shampoo, t: jax.Array, axes: tuple[int, ...], s: BlocksState, factors: Arrays, id_B: jax.Array
) -> BlocksState:
  def renew(s: BlocksState, factors: Arrays) -> BlocksState:
    return change_bases(s, tuple(linalg.eigh(factor)[1] for factor in factors), axes)[0]

  start, period = factored.first_refresh(h), h.precondition_frequency
  return REFRESHES[h.refresh](grown_older(s), id_B, t, start, period, renew, factors)
