"""Learning-rate schedules at their edges: what the study writes, and runs too short for its
fractions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers import config
from beyond_outliers.optim import schedules

STUDY = dict(warmup=0.05, cooldown=0.2, start=0.001, end=0.0)


def rates(name, num_steps, peak=2.0, **changes):
  """The learning rate of update 1, 2, ..., num_steps, and what would come after."""
  schedule = schedules.SCHEDULES[name](
    config.Schedule(name, **{**STUDY, **changes}), peak, num_steps
  )
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(num_steps + 1)), np.float64)


def test_trapezoidal_is_the_studys():
  """Linear from 0.001 of the peak over the first 5 %, constant, linear to 0 over the last 20 %."""
  rate = rates("trapezoidal", 1000)
  np.testing.assert_allclose(rate[0], 2 * 0.001, rtol=1e-5)
  np.testing.assert_allclose(np.diff(rate[:51]), 2 * 0.999 / 50, rtol=1e-3)
  np.testing.assert_array_equal(rate[50:801], 2.0)
  np.testing.assert_allclose(np.diff(rate[800:]), -2 / 200, rtol=1e-3)
  np.testing.assert_allclose(rate[[900, 999, 1000]], [1.0, 0.01, 0.0], atol=1e-6)


def test_cosine_falls_from_the_end_of_the_warm_up():
  rate = rates("cosine", 1000, end=0.1)
  np.testing.assert_allclose(rate[[0, 25, 50]], [0.002, 2 * 0.5005, 2.0], rtol=1e-5)
  np.testing.assert_allclose(
    rate[50:], 2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(951) / 950))), rtol=1e-5
  )
  np.testing.assert_allclose(rate[1000], 0.2, rtol=1e-6)


def test_constant_stays():
  rate = rates("constant", 1000)
  np.testing.assert_allclose(rate[[0, 25]], [0.002, 2 * 0.5005], rtol=1e-5)
  np.testing.assert_array_equal(rate[50:], 2.0)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize(
  "changes",
  [{}, {"warmup": 0.0}, {"warmup": 1.0, "cooldown": 0.0}, {"warmup": 0.5, "cooldown": 0.5}],
)
def test_short_runs_train_at_every_step(name, num_steps, changes):
  rate = rates(name, num_steps, **changes)[:num_steps]
  assert np.all(np.isfinite(rate)) and np.all(rate > 0) and np.all(rate <= 2.0 + 1e-6)
  if num_steps == 1 and not changes:
    assert rate[0] == 2.0, "a run of one step has no warm-up"


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_starts_warm_and_peaks_once_warmed_up(name):
  rate = rates(name, 40, start=0.25)
  np.testing.assert_allclose(rate[:3], [0.5, 1.25, 2.0], rtol=1e-6)
  assert rate.argmax() == 2
