"""Calls that XLA's CPU compiler does not inline, and transposes that it does not fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def outlined_call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
  """function(*arguments), whose first result is an array; under jit on CPU, a call that is not
  inlined, so that its results are materialized.

  XLA:CPU schedules for concurrency, not memory, and recomputes cheap values in every consumer,
  which keeps their inputs alive instead. Optimization barriers prevent neither: XLA:CPU removes
  them first."""
  first, *others = jax.jit(function)(*arguments)
  if jax.default_backend() == "cpu":
    # The metadata is attached to the operation that makes the value: the call.
    first = set_xla_metadata(first, inlineable="false")
  return first, *others


def materialized_transpose(x):
  """x.T, on CPU as a copy that the compiler does not fold into the product that follows.

  XLA's CPU library is fast for bfloat16 and int8 only if the first operand's rows are summed over.
  Otherwise bfloat16 is cast to float32, at half the speed or less, and int8 runs at an eighth. XLA
  folds transposes into products before it checks this, but turns a convolution by one into a
  transpose only afterwards."""
  return lax.platform_dependent(x, cpu=_copy_by_convolution, default=jnp.transpose)


def _copy_by_convolution(x):
  one = jnp.ones((1, 1, 1, 1), x.dtype)
  specs = ("NHWC", "HWIO", "NWHC")
  return lax.conv_general_dilated(
    x[None, :, :, None], one, (1, 1), "VALID", dimension_numbers=specs
  )[0, :, :, 0]
