"""Which blocks are renewed when."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.optim import refresh

COUNTS, PERIODS, NUMBERS = (1, 2, 4, 5, 11), (1, 3, 4), (0, 1)
CASES = list(itertools.product(COUNTS, PERIODS, NUMBERS))
STEPS = 7 + np.arange(8)


def fresh(count):
  """Blocks that have not been renewed yet, as a tree, and what each is given: its own name."""
  return {"name": jnp.zeros(count), "matrix": jnp.zeros((count, 2, 2))}, {
    "own": 1 + jnp.arange(float(count))
  }


def renew(blocks, given):
  assert blocks["matrix"].shape == (*given["own"].shape, 2, 2)
  return {"name": given["own"], "matrix": blocks["matrix"] + given["own"][:, None, None]}


@pytest.fixture(scope="module")
def renewed():
  """By (blocks, period, number of the first): what each step makes of fresh blocks."""

  def of(count, period, number):
    blocks, given = fresh(count)
    numbers = number + jnp.arange(count)
    return jax.lax.map(
      lambda step: refresh.staggered(blocks, numbers, step, period, renew, given), STEPS
    )

  return dict(
    zip(CASES, jax.device_get(jax.jit(lambda: [of(*case) for case in CASES])()), strict=True)
  )


@pytest.mark.parametrize("count", COUNTS)
def test_a_block_is_renewed_by_what_is_its_own_when_the_steps_since_its_number_are_whole_periods(
  renewed, count
):
  for period, number in itertools.product(PERIODS, NUMBERS):
    after = renewed[count, period, number]
    due = (STEPS[:, None] - number - np.arange(count)) % period == 0
    np.testing.assert_array_equal(after["name"], np.where(due, 1 + np.arange(count), 0))
    np.testing.assert_array_equal(
      after["matrix"], np.broadcast_to(after["name"][..., None, None], after["matrix"].shape)
    )


@pytest.mark.parametrize("due", [True, False])
def test_together_it_is_all_or_none(due):
  after = refresh.together(fresh(3)[0], jnp.bool_(due), renew, fresh(3)[1])
  np.testing.assert_array_equal(after["name"], [1, 2, 3] if due else 0)
