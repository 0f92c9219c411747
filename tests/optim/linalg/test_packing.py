"""Half a symmetric matrix, and all of it back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.optim.linalg.packing import pack, unpack

WIDTHS = range(1, 10)


@pytest.fixture(scope="module")
def matrices():
  """By width: three symmetric matrices whose entries are all different, packed, and unpacked
  again."""
  numbers = {d: np.arange(1, 3 * d * d + 1, dtype=np.float32).reshape(3, d, d) for d in WIDTHS}
  whole = {d: np.triu(a) + np.triu(a, 1).swapaxes(1, 2) for d, a in numbers.items()}
  packed = jax.jit(lambda tree: {d: pack(a) for d, a in tree.items()})(whole)
  return whole, packed, jax.jit(lambda tree: {d: unpack(a, d) for d, a in tree.items()})(packed)


@pytest.mark.parametrize("d", WIDTHS)
def test_nothing_is_lost(matrices, d):
  whole, _, again = matrices
  np.testing.assert_array_equal(again[d], whole[d])


@pytest.mark.parametrize("d", WIDTHS)
def test_every_number_is_kept_once(matrices, d):
  """An odd width has room for the next even one, whose last row and column are zero."""
  whole, packed, _ = matrices
  even = d + d % 2
  assert packed[d].shape == (3, even + 1, even // 2)
  for a, rectangle in zip(whole[d], np.asarray(packed[d]), strict=True):
    np.testing.assert_array_equal(
      np.sort(rectangle[rectangle != 0]), np.sort(a[np.triu_indices(d)])
    )


def test_types_stay():
  packed, again = jax.eval_shape(
    lambda a: (pack(a), unpack(pack(a), 5)), jax.ShapeDtypeStruct((2, 5, 5), jnp.bfloat16)
  )
  assert packed.dtype == again.dtype == jnp.bfloat16 and again.shape == (2, 5, 5)
