"""The estimated spectral norm, against numpy's singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.optim.linalg.spectral_norm import spectral_norm


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 1, 7), (2, 6, 1), (1, 1, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e18])
def test_it_is_a_close_lower_bound(shape, scale):
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(scale)
  exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:, 0]
  ours = np.asarray(jax.jit(spectral_norm)(x), np.float64)
  assert (ours <= exact * (1 + 1e-5)).all()
  np.testing.assert_allclose(ours, exact, rtol=0.08)


def test_separated_values_are_found_to_rounding():
  rng = np.random.default_rng(1)
  u, v = (np.linalg.qr(rng.standard_normal((2, 6, 6)))[0] for _ in range(2))
  x = u * np.array([5.0, 2.0, 1.0, 0.5, 0.1, 0.0]) @ v
  np.testing.assert_allclose(spectral_norm(jnp.asarray(x, jnp.float32)), 5.0, rtol=1e-5)


def test_a_start_orthogonal_to_the_largest_direction_is_not_taken():
  """The sum of the rows is zero along the largest singular vector here."""
  x = np.diag([3.0, 3.0, 1.0])[None]
  x[0, 1] = [0, -3.0, 0]
  np.testing.assert_allclose(spectral_norm(jnp.asarray(x, jnp.float32)), 3.0, rtol=1e-6)


def test_zero_is_zero_and_matrices_do_not_mix():
  np.testing.assert_array_equal(jax.jit(spectral_norm)(jnp.zeros((2, 1, 1))), 0)
  x = jnp.stack([jnp.zeros((3, 4)), jnp.full((3, 4), 2.0)])
  np.testing.assert_allclose(spectral_norm(x), [0.0, 2 * np.sqrt(12)], rtol=1e-6)
