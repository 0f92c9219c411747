"""Spikes: updates whose loss or gradient norm jumps above those of previous updates; for jit.

Like step skipping in OLMo-core, levanter and MaxText, except that skipped updates do not enter the
window: one outlier must not make the next look normal.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Recent(NamedTuple):
  """Losses and gradient norms of the last W updates in a ring: update n, from 0, is at n mod W."""

  losses: jax.Array  # [W] float32
  gradient_norms: jax.Array  # [W] float32
  skipped: jax.Array  # int32: updates skipped so far as spikes


def init_recent(window: int) -> Recent:
  """The window before any update."""
  return Recent(jnp.zeros(window), jnp.zeros(window), jnp.zeros((), jnp.int32))


def leaps(
  recent: Recent, updates: jax.Array, loss: jax.Array, gradient_norm: jax.Array, sigmas: float
) -> jax.Array:
  """Whether the loss or the gradient norm is more than `sigmas` sample standard deviations (divisor
  n - 1) above its mean over the window; never before half of the window is filled.

  updates: done so far, without skipped ones."""

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
  """The window after one more update, which enters it if `good` and is counted if `skipped` as a
  spike. updates: done before it, without skipped ones."""
  at = updates % recent.losses.size
  return Recent(
    recent.losses.at[at].set(jnp.where(good, loss, recent.losses[at])),
    recent.gradient_norms.at[at].set(jnp.where(good, gradient_norm, recent.gradient_norms[at])),
    recent.skipped + skipped,
  )
