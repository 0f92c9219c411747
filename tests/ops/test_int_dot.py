"""Products of codes: whole numbers, however the operands lie and whatever type multiplies them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.ops.int_dot import dot_codes

# So many products of int8 codes, and no more, float32 sums exactly in any case.
EXACT = 2**24 // 127**2


@pytest.mark.parametrize("width", [EXACT, EXACT + 1000])
def test_int8_and_float32_agree_to_the_bit_while_sums_stay_below_two_to_the_24(width):
  draw = np.random.default_rng(0)
  x = draw.choice([-127, -126, 126, 127], (16, width)).astype(np.int8)
  x[:2], x[0, -1] = 127, 126  # the largest sum, and one that is odd beside it
  exact = x.astype(np.int64) @ x.T.astype(np.int64)
  integer, floating = (
    jax.jit(lambda x, dtype=dtype: dot_codes(x, x, 1, 1, dtype))(x)
    for dtype in (jnp.int8, jnp.float32)
  )
  assert integer.dtype == jnp.int32
  np.testing.assert_array_equal(integer, exact)
  assert (
    (exact.max() < 2**24)
    == (width == EXACT)
    == np.array_equal(np.asarray(floating, np.float64), exact)
  )


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_either_axis_of_either_operand(axes, dtype):
  draw = np.random.default_rng(0)
  a, b = (
    draw.integers(-15, 16, (24, 40)).astype(np.float32),
    draw.integers(-15, 16, (40, 8)).astype(np.float32),
  )
  laid = a.T if axes[0] == 0 else a, b if axes[1] == 0 else b.T
  y = jax.jit(lambda a, b: dot_codes(a, b, *axes, dtype))(*laid)
  np.testing.assert_array_equal(y, a @ b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("widths", [(48, 16), (16, 48)])
def test_the_compiled_product_of_a_gradient_has_the_narrower_matrix_first(widths, dtype):
  """XLA would fold an ordinary transpose of the result back into the product."""
  a, b = (jnp.ones((64, width), dtype) for width in widths)
  compiled = jax.jit(lambda a, b: dot_codes(a, b, 0, 0, dtype)).lower(a, b).compile()
  products = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", compiled.as_text())
  assert products == [("16", "48")]


@pytest.mark.parametrize("axes", [(0, 0), (1, 1)])
def test_sums_too_long_for_int32_do_not_wrap(axes):
  """A gradient of weights sums over all tokens of a batch: 140,000 products of 127 and 127 are
  beyond 2^31."""
  long = jnp.full((140_000, 2), 127, jnp.int8).at[::3, 1].set(-126)
  laid = [long if axis == 0 else long.T for axis in axes]
  y = jax.jit(lambda a, b: dot_codes(a, b, *axes, jnp.int8))(*laid)
  exact = np.asarray(long, np.int64).T @ np.asarray(long, np.int64)
  assert exact.max() > 2**31
  np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-23)
