"""Which blocks are renewed when."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.optim import refresh

COUNTS, PERIODS, PHASES = (1, 2, 4, 5, 11), (1, 3, 4), (0, -1)
CASES = list(itertools.product(COUNTS, PERIODS, PHASES))
FIRST = 7                                      # step


def fresh(count):
  """Blocks that have not been renewed yet, as a tree, and what each is given: its own name."""
  return {"name": jnp.zeros(count), "matrix": jnp.zeros((count, 2, 2))}, {"own": 1 + jnp.arange(float(count))}


def renew(blocks, given):
  assert blocks["matrix"].shape == (*given["own"].shape, 2, 2)
  return {"name": given["own"], "matrix": blocks["matrix"] + given["own"][:, None, None]}


@pytest.fixture(scope="module")
def renewed():
  """By (blocks, period, phase): what each step of two periods makes of fresh blocks."""
  def of(count, period, phase):
    blocks, given = fresh(count)
    return jax.lax.map(lambda step: refresh.staggered(blocks, step, period, phase, renew, given), FIRST + jnp.arange(2 * period))
  return dict(zip(CASES, jax.device_get(jax.jit(lambda: [of(*case) for case in CASES])()), strict=True))


def hits(renewed, *case):
  """[steps, blocks]: who is renewed when."""
  return renewed[case]["name"] != 0


@pytest.mark.parametrize("count", COUNTS)
def test_every_block_is_renewed_once_a_period_by_what_is_its_own(renewed, count):
  for period, phase in itertools.product(PERIODS, PHASES):
    hit, after = hits(renewed, count, period, phase), renewed[count, period, phase]
    np.testing.assert_array_equal(hit[:period].sum(0), 1)
    np.testing.assert_array_equal(hit[period:], hit[:period])
    np.testing.assert_array_equal(after["name"], np.where(hit, 1 + np.arange(count), 0))
    np.testing.assert_array_equal(after["matrix"], np.broadcast_to(after["name"][..., None, None], after["matrix"].shape))


@pytest.mark.parametrize("count", COUNTS)
def test_no_step_has_more_than_its_share(renewed, count):
  for period, phase in itertools.product(PERIODS, PHASES):
    a_step = hits(renewed, count, period, phase).sum(1)
    assert a_step.max() == -(-count // period) and a_step.min() == count // period


def test_the_phase_says_when_those_left_over_begin(renewed):
  for count, period, phase in CASES:
    for rank in range(count % period):
      steps = FIRST + np.flatnonzero(hits(renewed, count, period, phase)[:, count - count % period + rank])
      np.testing.assert_array_equal((steps + phase) % period, rank)


def test_a_bucket_whose_phase_moves_on_fills_the_others_gaps(renewed):
  """One block of the first is left over, and the second begins a step later."""
  for first, second, period in itertools.product(COUNTS, COUNTS, PERIODS):
    if first % period == 1:
      a_step = hits(renewed, first, period, 0).sum(1) + hits(renewed, second, period, -1).sum(1)
      assert a_step.max() == -(-(first + second) // period)


@pytest.mark.parametrize("due", [True, False])
def test_together_it_is_all_or_none(due):
  after = refresh.together(fresh(3)[0], jnp.bool_(due), renew, fresh(3)[1])
  np.testing.assert_array_equal(after["name"], [1, 2, 3] if due else 0)
