"""A transpose that CPUs keep in front of a narrow matrix product."""
from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def transposed(x):
  """x.T, on CPU as a copy that the compiler does not fold into the product that follows.

  XLA's CPU library multiplies bfloat16 and int8 only where the first operand is stored as the rows that are summed over, and
  casts bfloat16 to float32 else, at half the speed or less, and sums int8 at an eighth. XLA folds transposes into products
  before it looks, but turns a convolution by one into a transpose only afterwards."""
  return lax.platform_dependent(x, cpu=_transposed_copy, default=jnp.transpose)


def _transposed_copy(x):
  one = jnp.ones((1, 1, 1, 1), x.dtype)
  specs = ("NHWC", "HWIO", "NWHC")
  return lax.conv_general_dilated(x[None, :, :, None], one, (1, 1), "VALID", dimension_numbers=specs)[0, :, :, 0]
