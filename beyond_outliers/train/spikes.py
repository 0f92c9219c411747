"""Spikes: updates whose loss or gradient norm jumps above those of previous updates; runs in jit.

Like the skipping of steps in OLMo-core, levanter and MaxText, except that skipped updates do not
enter the window: one outlier must not make room for the next.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Recent(NamedTuple):
  """Loss and gradient norm of the last W updates, in a ring: update n is at n mod W, from 0."""

  losses: jax.Array  # [W] float32
  gradient_norms: jax.Array  # [W] float32
  skipped: jax.Array  # int32: updates skipped so far because they leapt


def init_recent(window: int) -> Recent:
  """Those of no updates."""
  return Recent(jnp.zeros(window), jnp.zeros(window), jnp.zeros((), jnp.int32))


def leaps(
  recent: Recent, updates: jax.Array, loss: jax.Array, gradient_norm: jax.Array, sigmas: float
) -> jax.Array:
  """Whether a loss or a gradient norm is more than `sigmas` standard deviations (of a sample: by
  n - 1) above the mean of those in the window; never before half of it is filled.

  updates: done so far, skipped ones not counted."""

  def above(window_W: jax.Array, value: jax.Array):
    size = window_W.size
    count = jnp.minimum(updates, size)
    filled_W = jnp.arange(size) < count
    mean = jnp.where(filled_W, window_W, 0).sum() / jnp.maximum(count, 1)
    squares = jnp.where(filled_W, (window_W - mean) ** 2, 0).sum()
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return (count >= size // 2) & (value - mean > sigmas * deviation)

  return above(recent.losses, loss) | above(recent.gradient_norms, gradient_norm)


def after_update(
  recent: Recent,
  updates: jax.Array,
  loss: jax.Array,
  gradient_norm: jax.Array,
  good: jax.Array,
  skipped: jax.Array,
) -> Recent:
  """The window after one more update, which enters it if `good`, and is counted if it leapt and was
  `skipped`. updates: done before it."""
  at = updates % recent.losses.size
  return Recent(
    recent.losses.at[at].set(jnp.where(good, loss, recent.losses[at])),
    recent.gradient_norms.at[at].set(jnp.where(good, gradient_norm, recent.gradient_norms[at])),
    recent.skipped + skipped,
  )
