"""The matrix product that both backends make of codes: exact where they are integers, in the operands' type elsewhere."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from beyond_outliers.transpose import transposed


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype: Any) -> jax.Array:
  """Of two matrices, summed over these axes, with operands in `dtype`: int8 in int32, others in float32 or wider."""
  a, b, dtype = a.astype(dtype), b.astype(dtype), jnp.dtype(dtype)
  if a_axis == 0 and dtype.itemsize < 4:
    a, a_axis = transposed(a), 1
  # Whoever asks for float32 gets it: left to themselves TPUs take bfloat16 passes, and recent GPUs TF32.
  precision = lax.Precision.HIGHEST if dtype.itemsize >= 4 else None
  total = jnp.int32 if dtype == jnp.int8 else jnp.promote_types(dtype, jnp.float32)
  return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision, total)
