"""Spikes: which updates leap above those before, against NumPy; and what a step does about it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beyond_outliers.train import spikes, step

WINDOW, SIGMAS = 8, 3.0


def expected_leaps(losses, norms):
  """By the definition: sample mean and deviation of the last WINDOW updates that were not skipped,
  once there are half as many."""
  kept, found = [], []
  for pair in zip(losses, norms, strict=True):
    window = np.array(kept[-WINDOW:], np.float64).reshape(-1, 2)
    above = len(window) >= WINDOW // 2 and np.any(
      pair > window.mean(0) + SIGMAS * window.std(0, ddof=1)
    )
    found.append(bool(above))
    if not above:
      kept.append(pair)
  return found


def test_what_leaps_is_what_numpy_finds():
  rng = np.random.default_rng(0)
  losses = 5 - np.linspace(0, 2, 60) + 0.1 * rng.standard_normal(60)
  norms = 1 + 0.1 * rng.standard_normal(60)
  losses[[1, 20, 21, 22, 40]] += [0.3, 9, 9, 9, 2]  # the first has no half window before it
  norms[[30, 41, 59]] += [1, 5, 3]

  @jax.jit
  def after(recent, updates, loss, norm):
    leapt = spikes.leaps(recent, updates, loss, norm, SIGMAS)
    return leapt, spikes.after_update(recent, updates, loss, norm, ~leapt, leapt)

  recent, updates, found = spikes.init_recent(WINDOW), jnp.int32(0), []
  for loss, norm in zip(np.float32(losses), np.float32(norms), strict=True):
    leapt, recent = after(recent, updates, loss, norm)
    updates += 1 - leapt
    found.append(bool(leapt))
  assert found == expected_leaps(losses, norms)
  assert not found[1] and all(found[i] for i in (20, 21, 22, 30, 40, 41, 59))
  assert int(recent.skipped) == sum(found) < 14


def loss_fn(params, batch, rng):
  del rng
  return jnp.sum(params["w"]) * batch["slope"] + batch["level"], {"weight": jnp.ones(())}


def test_a_spike_is_skipped_and_counted_apart_from_what_is_not_finite():
  tx = optax.adam(0.01)
  train_step = jax.jit(
    step.make_train_step(
      loss_fn, tx, {"all": lambda count: count}, seed=0, average_decay=0.5, spike_sigmas=6.0
    )
  )
  state = step.init_state({"w": jnp.ones(3)}, tx, averaged=True, spike_window=4)
  start, rng = jax.tree.map(jnp.shape, state), np.random.default_rng(1)
  counts = []
  for slope, level in [(1, 0)] * 4 + [(9, 0), (1, 1e3), (np.nan, 0), (1, -1)]:
    noise = 1 + 0.1 * rng.random()
    batch = {"slope": np.float32(slope * noise), "level": np.float32(level)}
    before, (state, metrics) = state, train_step(state, batch)
    counts.append(
      tuple(int(metrics[name]) for name in ("skipped", "spikes", "skipped_in_a_row", "lr/all"))
    )
    if metrics["skipped_in_a_row"]:
      for name in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
      np.testing.assert_array_equal(state.recent.losses, before.recent.losses)
  zero = [(0, 0, 0, i) for i in range(4)]
  assert counts == [*zero, (0, 1, 1, 4), (0, 2, 2, 4), (1, 2, 3, 4), (1, 2, 0, 4)]
  assert jax.tree.map(jnp.shape, state) == start


def test_a_long_gradient_is_scaled_down_to_its_bound():
  """Over all parameters together, as torch.nn.utils.clip_grad_norm_ does; what is logged is the
  norm as it was."""
  tx, params = optax.sgd(1.0), {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}

  def linear(params, batch, rng):
    return sum(jnp.vdot(params[name], batch[name]) for name in params), {"weight": jnp.ones(())}

  train_step = jax.jit(step.make_train_step(linear, tx, {}, seed=0, max_gradient_norm=2.0))
  for scale in (10.0, 0.1):
    gradient = {"a": scale * np.float32([1, 2, 3]), "b": scale * np.float32([[1, -1], [4, 2]])}
    norm = scale * 6.0
    state, metrics = train_step(step.init_state(params, tx), gradient)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
    for name, x in state.params.items():
      np.testing.assert_allclose(x, -gradient[name] * min(1, 2 / norm), rtol=1e-6)
