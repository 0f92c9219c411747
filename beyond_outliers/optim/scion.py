"""Scion: steps along the LMO of a norm ball for an averaged gradient (arXiv 2502.07529).

The LMO (linear minimization oracle) is here the point of the ball furthest along that average; its
negative is the step.

Legend: S slices of a leaf, M and N their rows and columns in the leaf's own order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers.config.optimizers import Scion
from beyond_outliers.optim import factory
from beyond_outliers.optim.axes import AxesTree, Leaf, by_kind, leaves
from beyond_outliers.optim.muon import has_average, scale_by_muon

EPS = 1e-8  # added to norms


class ScaleByNormState(NamedTuple):
  mu: optax.Updates  # averages of gradients, like the parameters; () without momentum


def _sign(d: jax.Array, leaf: Leaf, normalized: bool) -> jax.Array:
  return jnp.sign(d) / (leaf.fan_in if normalized else 1)


def _col(d: jax.Array, leaf: Leaf, normalized: bool) -> jax.Array:
  return _over_rms(d, _fan_out_axes(leaf), leaf.fan_in if normalized else 1)


def _row(d: jax.Array, leaf: Leaf, normalized: bool) -> jax.Array:
  return _over_rms(d, _fan_in_axes(leaf), leaf.fan_in if normalized else math.sqrt(leaf.fan_in))


def _rms(d: jax.Array, leaf: Leaf, normalized: bool) -> jax.Array:
  del normalized
  return _over_rms(d, _fan_in_axes(leaf) + _fan_out_axes(leaf), 1)


# (d [S, *size], leaf, normalized) -> the point of the unit ball, for the norms that need no matrix
# products. A vector counts as a matrix of one column, with fan-in 1.
NORMS: dict[str, Callable[[jax.Array, Leaf, bool], jax.Array]] = {
  "sign": _sign,
  "col": _col,
  "row": _row,
  "rms": _rms,
}


@factory.arguments_of(Scion, without=("learning_rate", "constrained", "weight_decay"))
def scale_by_scion(
  h: Scion, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Scion's direction, to be subtracted."""
  return _direction(h, axes, mesh)


@factory.arguments_of(Scion)
def scion(
  h: Scion, *, axes: AxesTree = None, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
  """Scion with one norm for all leaves; for several norms use groups of parameters.

  Algorithms 1 and 2; LIONS-EPFL/scion, f58a393.

  For the official transpose=True (embeddings), swap fan_in and fan_out in `axes`. An average is
  kept unless momentum is the Python number 0.
  State: 4 bytes per element in float32, none without momentum."""
  decay = 1.0 + h.weight_decay if h.constrained else h.weight_decay
  return optax.chain(
    _direction(h, axes, mesh),
    optax.add_decayed_weights(decay),
    optax.scale_by_learning_rate(h.learning_rate),
  )


def initialize(
  key: jax.Array,
  params: Any,
  axes: AxesTree = None,
  *,
  norm: str = "auto",
  scale: float = 1.0,
  normalized: bool | None = None,
  clamp: bool = False,
) -> Any:
  """Random matrices on the surface of the ball, the official starting point of Scion; vectors and
  scalars are left as they are.

  key: a typed key of jax.random. The other arguments are those of `scion`."""
  h = Scion.given(norm=norm, scale=scale, normalized=normalized, clamp=clamp)

  def draw(key: jax.Array, leaf: Leaf, x: jax.Array) -> jax.Array:
    if not leaf.is_matrix:
      return x
    noise_SxMxN = jax.random.normal(key, (leaf.slices, *leaf.size), _accumulator(x))
    if norm in NORMS:
      point_SxMxN = NORMS[norm](noise_SxMxN, leaf, _is_normalized(h))
    else:
      u, _, v = jnp.linalg.svd(noise_SxMxN, full_matrices=False)
      point_SxMxN = jnp.matmul(_spectral_scale(h, leaf) * u, v, precision="highest")
    return leaf.join(scale * point_SxMxN).astype(x.dtype)

  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(
    structure, map(draw, jax.random.split(key, len(flat)), leaves(params, axes), flat)
  )


def _direction(
  h: Scion, axes: AxesTree, mesh: jax.sharding.Mesh | None
) -> optax.GradientTransformation:
  spectral = scale_by_muon(
    axes=axes,
    mesh=mesh,
    momentum=h.momentum,
    nesterov=False,
    ns_steps=h.ns_steps,
    ns_coefficients=h.ns_coefficients,
    ns_dtype=h.ns_dtype,
    ns_gram=h.ns_gram,
    scale=functools.partial(_spectral_scale, h),
  )
  if h.norm == "spectral":
    direction = spectral
  elif h.norm == "auto":
    direction = by_kind(axes, matrix=spectral, other=_scale_by_norm(h, "rms", axes))
  else:
    direction = _scale_by_norm(h, h.norm, axes)
  return optax.chain(direction, optax.scale(h.scale))


def _scale_by_norm(h: Scion, norm: str, axes: AxesTree) -> optax.GradientTransformation:
  """LMO of the unit ball for each slice of each leaf, in the parameters' sharding: these norms need
  only elements or sums along an axis, so carrying matrices into blocks and back would not pay."""
  averages = has_average(h.momentum)

  def init(params):
    return ScaleByNormState(
      jax.tree.map(lambda x: jnp.zeros(x.shape, _accumulator(x)), params) if averages else ()
    )

  def average(mu: jax.Array, g: jax.Array) -> jax.Array:
    return (h.momentum * mu + (1 - h.momentum) * g).astype(mu.dtype)

  def update(updates, state, params=None):
    del params
    d = jax.tree.map(lambda g: g.astype(_accumulator(g)), updates)
    if averages:
      d = jax.tree.map(average, state.mu, d)
      state = ScaleByNormState(d)
    flat, structure = jax.tree.flatten(updates)
    points = [
      leaf.join(NORMS[norm](leaf.split(x), leaf, _is_normalized(h))).astype(g.dtype)
      for leaf, x, g in zip(leaves(updates, axes), jax.tree.leaves(d), flat, strict=True)
    ]
    return jax.tree.unflatten(structure, points), state

  return optax.GradientTransformation(init, update)


def _is_normalized(h: Scion) -> bool:
  """Whether the norm is normalized by fan_in."""
  return h.norm != "col" if h.normalized is None else h.normalized


def _spectral_scale(h: Scion, leaf: Leaf) -> float:
  factor = math.sqrt(leaf.fan_out / (leaf.fan_in if _is_normalized(h) else 1))
  return max(factor, 1 if h.clamp else 0)


def _over_rms(d: jax.Array, axes: tuple[int, ...], factor: float) -> jax.Array:
  return d / (jnp.sqrt(jnp.mean(d * d, axes, keepdims=True)) * factor + EPS)


def _fan_in_axes(leaf: Leaf) -> tuple[int, ...]:
  """The fan-in's axes in [S, *size]."""
  return () if leaf.fan_in_axis is None else (1 + leaf.fan_in_axis,)


def _fan_out_axes(leaf: Leaf) -> tuple[int, ...]:
  return tuple(1 + axis for axis in range(len(leaf.size)) if axis != leaf.fan_in_axis)


def _accumulator(x: jax.Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)
