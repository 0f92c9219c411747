"""Maxima and minima: numpy's, NaN included, whatever the size, type and axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from beyond_outliers import config, mesh
from beyond_outliers.ops import extremes

NUMPYS = {
  extremes.max_magnitude: lambda x, **how: np.max(np.abs(x), **how),
  extremes.max_or_nan: np.max,
  extremes.min_or_nan: np.min,
}


@pytest.mark.parametrize("ours", NUMPYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [None, np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  "shape,axis", [((7,), None), ((4096,), None), ((96, 64), 0), ((2, 5000), 1)]
)
def test_they_are_numpys(ours, dtype, bad, shape, axis):
  """-NaN is what x86 makes of inf - inf."""
  x = np.random.default_rng(0).standard_normal(shape).astype(jnp.dtype(dtype))
  if bad is not None:
    x.flat[3] = bad
  for keepdims in (False, True):
    found = ours(jnp.asarray(x), axis, keepdims)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(
      np.asarray(found, np.float32),
      NUMPYS[ours](x.astype(np.float32), axis=axis, keepdims=keepdims),
    )


@pytest.mark.parametrize("ours", NUMPYS)
def test_a_nan_on_another_device_is_seen(ours):
  x = np.zeros((8, 4096), np.float32)
  x[5, 7] = np.nan
  on = mesh.make_mesh(config.Mesh(8, 1, 1))
  split = NamedSharding(on, PartitionSpec(on.axis_names))
  whole = jax.jit(ours, out_shardings=mesh.replicated(on))(jax.device_put(x, split))
  assert np.isnan(whole)
  of_each = jax.shard_map(
    lambda x: ours(x, 1), mesh=on, in_specs=split.spec, out_specs=split.spec, check_vma=False
  )(jax.device_put(x, split))
  np.testing.assert_array_equal(np.isnan(of_each), np.arange(8) == 5)
