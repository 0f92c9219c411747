"""Grafting: a direction is given another method's step length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.optim import blocks, grafting


@pytest.mark.parametrize("granularity", ["block", "parameter"])
def test_blocks_or_whole_slices_get_the_length_of_the_other_step(granularity):
  """A matrix of two blocks, of which the second counts in neither length if it has no roots."""
  tree = {"w": jnp.zeros((4, 8))}
  layout = blocks.layout(tree, block_size=4)
  draw = np.random.default_rng(0)
  step, direction = (jnp.asarray(draw.standard_normal((2, 4, 4)), jnp.float32) for _ in range(2))
  for counts in ([True, True], [True, False]):
    counts_B = jnp.array(counts)
    squares = grafting.squared_lengths(step, direction, counts_B)
    given = grafting.give_lengths(
      layout, granularity, {"4x4": direction}, {"4x4": squares}, {"4x4": counts_B}
    )["4x4"]
    over = slice(0, sum(counts)) if granularity == "parameter" else slice(0, 1)
    ratio = np.linalg.norm(step[over]) / np.linalg.norm(direction[over])
    np.testing.assert_allclose(given[0], ratio * direction[0], rtol=1e-5)
    if not counts[1]:
      np.testing.assert_array_equal(given[1], direction[1])


@pytest.mark.parametrize("name", [name for name, row in grafting.GRAFTS.items() if row])
def test_rows_need_a_second_moment_or_not(name):
  row = grafting.GRAFTS[name]
  g = jax.random.normal(jax.random.key(0), (2, 3))
  v = g * g if row.has_second_moment else None
  expected = jnp.sign(g) if row.has_second_moment else g
  np.testing.assert_allclose(row.direction(g, v, 0.0), expected, rtol=1e-6)
