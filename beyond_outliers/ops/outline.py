"""Rewrites that XLA's CPU compiler would undo: calls not to inline, transposes not to fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def outlined_call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
  """function(*arguments), which begin with an array; under jit on CPU a call that is not inlined.

  XLA:CPU schedules for concurrency, not memory, and computes anew in every consumer what is cheap,
  so that what it is computed from stays alive instead. Optimization barriers don't keep it from
  either: it removes them first. Results of a call exist."""
  first, *others = jax.jit(function)(*arguments)
  if jax.default_backend() == "cpu":
    # Goes to what makes the value, which is the call.
    first = set_xla_metadata(first, inlineable="false")
  return first, *others


def materialized_transpose(x):
  """x.T, on CPU as a copy that the compiler does not fold into the product that follows.

  XLA's CPU library multiplies bfloat16 and int8 only where the first operand is stored as the rows
  that are summed over, and casts bfloat16 to float32 else, at half the speed or less, and sums int8
  at an eighth. XLA folds transposes into products before it looks, but turns a convolution by one
  into a transpose only afterwards."""
  return lax.platform_dependent(x, cpu=_copy_by_convolution, default=jnp.transpose)


def _copy_by_convolution(x):
  one = jnp.ones((1, 1, 1, 1), x.dtype)
  specs = ("NHWC", "HWIO", "NWHC")
  return lax.conv_general_dilated(
    x[None, :, :, None], one, (1, 1), "VALID", dimension_numbers=specs
  )[0, :, :, 0]
