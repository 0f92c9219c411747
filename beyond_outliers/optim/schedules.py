"""Learning-rate schedules, (config, peak, steps) -> schedule; phases are fractions of the run."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from beyond_outliers import config


def _warmup(c: config.Schedule, step, num_steps: int):
  """Linear warm-up from `start` to 1 over the first fraction `warmup` of the run."""
  steps = round(c.warmup * num_steps)
  return c.start + (1 - c.start) * jnp.minimum(step / max(steps, 1), 1.0) if steps else jnp.ones(())


def trapezoidal(c: config.Schedule, peak: float, num_steps: int) -> optax.Schedule:
  """Warm-up, constant, then linear to `end` over the last fraction `cooldown` of the run."""
  steps = round(c.cooldown * num_steps)

  def schedule(step):
    left = jnp.clip((num_steps - step) / max(steps, 1), 0.0, 1.0)
    return peak * jnp.minimum(_warmup(c, step, num_steps), c.end + (1 - c.end) * left)

  return schedule


def cosine(c: config.Schedule, peak: float, num_steps: int) -> optax.Schedule:
  """Warm-up, then half a cosine from 1 to `end`."""
  start = round(c.warmup * num_steps)

  def schedule(step):
    done = jnp.clip((step - start) / max(num_steps - start, 1), 0.0, 1.0)
    decay = c.end + (1 - c.end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return peak * jnp.where(step < start, _warmup(c, step, num_steps), decay)

  return schedule


def constant(c: config.Schedule, peak: float, num_steps: int) -> optax.Schedule:
  """Warm-up, then constant."""
  return lambda step: peak * _warmup(c, step, num_steps)


SCHEDULES: dict[str, Callable[[config.Schedule, float, int], optax.Schedule]] = {
  "trapezoidal": trapezoidal,
  "cosine": cosine,
  "constant": constant,
}
