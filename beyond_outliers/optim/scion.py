"""Scion: steps towards the point of a norm's ball that lies furthest along an averaged gradient
(arXiv 2502.07529).

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

from beyond_outliers.optim import factory
from beyond_outliers.optim.axes import AxesTree, Leaf, by_kind, leaves
from beyond_outliers.optim.linalg import newton_schulz
from beyond_outliers.optim.muon import has_average, scale_by_muon

EPS = 1e-8  # added to norms


class ScaleByNormState(NamedTuple):
  mu: optax.Updates  # averages of gradients, like the parameters; () without momentum


# (d [S, *size], leaf, normalized) -> the point of the unit ball, in the norms that need no matrix
# products. A vector counts as a matrix of one column, whose fan-in is 1.
NORMS: dict[str, Callable[[jax.Array, Leaf, bool], jax.Array]] = {
  "sign": lambda d, leaf, normalized: jnp.sign(d) / (leaf.fan_in if normalized else 1),
  "col": lambda d, leaf, normalized: _over_rms(
    d, _fan_out_axes(leaf), leaf.fan_in if normalized else 1
  ),
  "row": lambda d, leaf, normalized: _over_rms(
    d, _fan_in_axes(leaf), leaf.fan_in if normalized else math.sqrt(leaf.fan_in)
  ),
  "rms": lambda d, leaf, normalized: _over_rms(d, _fan_in_axes(leaf) + _fan_out_axes(leaf), 1),
}


def scale_by_scion(
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  momentum: float = 0.0,
  norm: str = "auto",
  scale: float = 1.0,
  normalized: bool | None = None,
  clamp: bool = False,
  ns_steps: int = 5,
  ns_coefficients: newton_schulz.Table = "quintic",
  ns_dtype: str | None = "bfloat16",
  ns_gram: bool = False,
) -> optax.GradientTransformation:
  """Scion's direction, to be subtracted; `scion` has the arguments' meaning."""
  normalized = _checked(norm, normalized, clamp)
  spectral = scale_by_muon(
    axes=axes,
    mesh=mesh,
    momentum=momentum,
    nesterov=False,
    ns_steps=ns_steps,
    ns_coefficients=ns_coefficients,
    ns_dtype=ns_dtype,
    ns_gram=ns_gram,
    scale=functools.partial(_spectral_scale, normalized=normalized, clamp=clamp),
  )
  if norm == "spectral":
    direction = spectral
  elif norm == "auto":
    direction = by_kind(
      axes, matrix=spectral, other=_scale_by_norm("rms", normalized, axes, momentum)
    )
  else:
    direction = _scale_by_norm(norm, normalized, axes, momentum)
  return optax.chain(direction, optax.scale(scale))


@factory.static_integers
def scion(
  learning_rate: optax.ScalarOrSchedule,
  *,
  axes: AxesTree = None,
  mesh: jax.sharding.Mesh | None = None,
  momentum: float = 0.0,
  norm: str = "auto",
  scale: float = 1.0,
  normalized: bool | None = None,
  clamp: bool = False,
  constrained: bool = True,
  weight_decay: float = 0.0,
  ns_steps: int = 5,
  ns_coefficients: newton_schulz.Table = "quintic",
  ns_dtype: str | None = "bfloat16",
  ns_gram: bool = False,
) -> optax.GradientTransformation:
  """Scion with one norm for all leaves; give groups of parameters their own (algorithms 1 and 2;
  LIONS-EPFL/scion, f58a393).

  momentum: decay of the average of gradients, not bias-corrected; the official argument is one
    minus it. The Python number 0 keeps no average.
  norm: "spectral": sqrt(fan_out / fan_in) times the orthogonalised matrix; "sign": 1 / fan_in times
    the signs; "col": each input's weights over their RMS; "row": each output's weights over their
    L2 norm and sqrt(fan_in); "rms": a slice over its RMS; "auto": spectral for matrices, rms for
    vectors and scalars. The official transpose=True, for embeddings, is an `axes` in which fan_in
    and fan_out are swapped.
  scale: radius of the ball.
  normalized: whether fan_in counts; None: as it does officially, in all norms but "col".
  clamp: spectral, fan_out < fan_in: a factor of 1 instead of sqrt(fan_out / fan_in), for input
    layers (the official max=True).
  constrained: weights stay in the ball, being decayed by the learning rate itself (algorithm 2);
    weight_decay comes on top.
  ns_...: as in `muon`.

  State: 4 bytes a number in float32, none without momentum."""
  direction = scale_by_scion(
    axes=axes,
    mesh=mesh,
    momentum=momentum,
    norm=norm,
    scale=scale,
    normalized=normalized,
    clamp=clamp,
    ns_steps=ns_steps,
    ns_coefficients=ns_coefficients,
    ns_dtype=ns_dtype,
    ns_gram=ns_gram,
  )
  decay = 1.0 + weight_decay if constrained else weight_decay
  return optax.chain(
    direction, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(learning_rate)
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
  """Random matrices on the surface of the ball, where Scion starts officially; vectors and scalars
  stay as they are.

  key: typed, of jax.random. The other arguments are those of `scion`."""
  normalized = _checked(norm, normalized, clamp)

  def draw(key: jax.Array, leaf: Leaf, x: jax.Array) -> jax.Array:
    if not leaf.is_matrix:
      return x
    noise_SxMxN = jax.random.normal(key, (leaf.slices, *leaf.size), _accumulator(x))
    if norm in NORMS:
      point_SxMxN = NORMS[norm](noise_SxMxN, leaf, normalized)
    else:
      u, _, v = jnp.linalg.svd(noise_SxMxN, full_matrices=False)
      point_SxMxN = _spectral_scale(leaf, normalized, clamp) * u @ v
    return leaf.join(scale * point_SxMxN).astype(x.dtype)

  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(
    structure, map(draw, jax.random.split(key, len(flat)), leaves(params, axes), flat)
  )


def _scale_by_norm(
  norm: str, normalized: bool, axes: AxesTree, momentum: float
) -> optax.GradientTransformation:
  """The point of the unit ball for each slice of each leaf, where the parameters lie: elements, or
  sums along an axis, are no reason to carry a matrix into blocks and back."""
  averages = has_average(momentum)

  def init(params):
    return ScaleByNormState(
      jax.tree.map(lambda x: jnp.zeros(x.shape, _accumulator(x)), params) if averages else ()
    )

  def update(updates, state, params=None):
    del params
    d = jax.tree.map(lambda g: g.astype(_accumulator(g)), updates)
    if averages:
      d = jax.tree.map(
        lambda mu, g: (momentum * mu + (1 - momentum) * g).astype(mu.dtype), state.mu, d
      )
      state = ScaleByNormState(d)
    flat, structure = jax.tree.flatten(updates)
    points = [
      leaf.join(NORMS[norm](leaf.split(x), leaf, normalized)).astype(g.dtype)
      for leaf, x, g in zip(leaves(updates, axes), jax.tree.leaves(d), flat, strict=True)
    ]
    return jax.tree.unflatten(structure, points), state

  return optax.GradientTransformation(init, update)


def _checked(norm: str, normalized: bool | None, clamp: bool) -> bool:
  """Whether fan_in counts. Errors: ValueError for an unknown norm, or for one that `clamp` says
  nothing about."""
  factory.one_of("norm", norm, ("auto", "spectral", *NORMS))
  if clamp and norm in NORMS:
    raise ValueError(
      f"clamp = True: norm = {norm!r} has no factor to clamp; leave it False, or take norm = "
      "'spectral'"
    )
  return norm != "col" if normalized is None else normalized


def _spectral_scale(leaf: Leaf, normalized: bool, clamp: bool) -> float:
  return max(math.sqrt(leaf.fan_out / (leaf.fan_in if normalized else 1)), 1 if clamp else 0)


def _over_rms(d: jax.Array, axes: tuple[int, ...], factor: float) -> jax.Array:
  return d / (jnp.sqrt(jnp.mean(d * d, axes, keepdims=True)) * factor + EPS)


def _fan_in_axes(leaf: Leaf) -> tuple[int, ...]:
  """Of [S, *size]."""
  return () if leaf.fan_in_axis is None else (1 + leaf.fan_in_axis,)


def _fan_out_axes(leaf: Leaf) -> tuple[int, ...]:
  return tuple(1 + axis for axis in range(len(leaf.size)) if axis != leaf.fan_in_axis)


def _accumulator(x: jax.Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)
