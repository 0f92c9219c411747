"""The train step: (state, batch) -> (state, metrics), pure, for jit.

Legend: B batch, L length, D model width, V vocabulary, T = B·L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from beyond_outliers import params as params_lib
from beyond_outliers.model import loss
from beyond_outliers.model.forward import Forward
from beyond_outliers.train import averages, spikes
from beyond_outliers.types import Batch, Metrics, Params

LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]


class TrainState(NamedTuple):
  """State that a run carries from step to step; a checkpoint holds it as the item `state`."""

  step: jax.Array  # int32: updates done, skipped ones included
  params: Params
  opt_state: Any
  skipped: jax.Array  # int32: updates skipped so far, because something in them was not finite
  skipped_in_a_row: jax.Array  # int32
  average: Params | None = None  # moving average of the parameters, if asked for
  recent: spikes.Recent | None = None  # window in which spikes are detected, if asked for


def init_state(
  params: Params, tx: optax.GradientTransformation, *, averaged: bool = False, spike_window: int = 0
) -> TrainState:
  """State at step 0, with the optimizer's initial state.

  averaged: with a moving average of the parameters, initially equal to them. spike_window: number
    of updates that spikes are compared with; 0: no detection."""
  # Every scalar is a separate array: a donated state must not hold the same buffer twice.
  return TrainState(
    jnp.zeros((), jnp.int32),
    params,
    tx.init(params),
    jnp.zeros((), jnp.int32),
    jnp.zeros((), jnp.int32),
    jax.tree.map(jnp.copy, params) if averaged else None,
    spikes.init_recent(spike_window) if spike_window else None,
  )


def make_loss_fn(forward: Forward) -> LossFn:
  """loss_fn(params, batch, rng) -> (weighted mean loss of targets, {"weight": sum of weights})."""

  def loss_fn(params: Params, batch: Batch, rng: jax.Array):
    weight = jnp.sum(batch["weights"])
    nll_BxL = loss.token_losses(forward, params, batch, rng)
    return jnp.sum(nll_BxL * batch["weights"]) / jnp.maximum(weight, 1), {"weight": weight}

  return loss_fn


def accumulate(
  loss_fn: LossFn, micro_batches: int
) -> Callable[[Params, Batch, jax.Array], tuple[Any, Params]]:
  """value_and_grad of a batch, accumulated over micro-batches with the memory of one."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if micro_batches == 1:
    return grad_fn

  def value_and_grad(params, batch, rng):
    # A part is every micro_batches-th row, so that each device's rows spread evenly over the parts.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0), batch
    )

    def add(sums, part_and_index):
      part, index = part_and_index
      (value, aux), grads = grad_fn(params, part, jax.random.fold_in(rng, index))
      # Parts may have unequal weights: undo the means, add, and divide once at the end.
      part_sums = jax.tree.map(lambda x: x * aux["weight"], (value, grads))
      return jax.tree.map(jnp.add, sums, (*part_sums, aux["weight"])), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    (value, grads, weight), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(micro_batches)))
    value, grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1), (value, grads))
    return (value, {"weight": weight}), grads

  return value_and_grad


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  schedules: Mapping[str, optax.Schedule],
  *,
  seed: int,
  shardings: Params | None = None,
  micro_batches: int = 1,
  average_decay: float = 0.0,
  max_gradient_norm: float = 0.0,
  spike_sigmas: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """train_step(state, batch) -> (state, metrics): one update. If its loss, gradient or resulting
  parameters are not finite, or if it is a spike (spikes.py), parameters and optimizer state stay as
  they were, and the update is counted as skipped.

  shardings: of the parameters, and so of their gradient; None: one device. average_decay: of the
    state's moving average, if it has one. max_gradient_norm: longer gradients are scaled down to
    it; 0: no limit. spike_sigmas: threshold of spikes, if the state has a window.
  Metrics, scalars: train/loss (nats), gradient_norm (before scaling), skipped (not finite, so far),
    spikes (so far, if detected), skipped_in_a_row (both kinds), lr/<group> (of this update)."""
  value_and_grad = accumulate(loss_fn, micro_batches)
  clip = optax.clip_by_global_norm(max_gradient_norm) if max_gradient_norm else optax.identity()

  def train_step(state: TrainState, batch: Batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)  # a restart draws the same numbers
    (value, _), grads = value_and_grad(state.params, batch, rng)
    if shardings is not None:
      # Otherwise the sharding of the optimizers' blocks propagates back into the model, where XLA
      # (jaxlib 0.10.2) then computes another loss on meshes with all three axes.
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    gradient_norm = optax.tree.norm(grads)
    grads, _ = clip.update(grads, clip.init(state.params))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(value) & jnp.isfinite(gradient_norm) & params_lib.all_finite(params)
    updates_done, good, recent = _judged(state, value, gradient_norm, finite, spike_sigmas)
    params, opt_state = _choose(good, (params, opt_state), (state.params, state.opt_state))
    rates = {
      f"lr/{label}": jnp.asarray(schedule(updates_done), jnp.float32)
      for label, schedule in schedules.items()
    }
    average = state.average
    if average is not None:
      moved = averages.moved_average(average, params, updates_done + 1, average_decay)
      average = _choose(good, moved, average)
    state = TrainState(
      state.step + 1,
      params,
      opt_state,
      state.skipped + 1 - finite.astype(jnp.int32),
      (state.skipped_in_a_row + 1) * (1 - good.astype(jnp.int32)),
      average,
      recent,
    )
    return state, {
      "train/loss": value,
      "gradient_norm": gradient_norm,
      "skipped": state.skipped,
      **({} if recent is None else {"spikes": recent.skipped}),
      "skipped_in_a_row": state.skipped_in_a_row,
      **rates,
    }

  return train_step


def _judged(
  state: TrainState,
  value: jax.Array,
  gradient_norm: jax.Array,
  finite: jax.Array,
  spike_sigmas: float,
) -> tuple[jax.Array, jax.Array, spikes.Recent | None]:
  """(updates so far, without skipped ones, which don't advance the schedules; whether this update
  is accepted; the window after it)."""
  updates_done, recent = state.step - state.skipped, state.recent
  if recent is None:
    return updates_done, finite, None
  updates_done -= recent.skipped
  leaps = spikes.leaps(recent, updates_done, value, gradient_norm, spike_sigmas)
  good = finite & ~leaps
  recent = spikes.after_update(
    recent, updates_done, value, gradient_norm, good, skipped=finite & leaps
  )
  return updates_done, good, recent


def _choose(good: jax.Array, new: Any, old: Any) -> Any:
  """The new tree of arrays if the scalar `good` is true, else the old one."""
  return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
