"""Parts of a program that XLA's CPU compiler must not mix."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def apart(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
  """function(*arguments), which begin with an array: under jit on CPU a call that the compiler does not inline.

  XLA:CPU schedules for concurrency, not memory, and computes anew in every consumer what is cheap, so that what it is computed
  from stays alive instead. Optimization barriers don't keep it from either: it removes them first. Results of a call exist."""
  first, *others = jax.jit(function)(*arguments)
  if jax.default_backend() == "cpu":
    first = set_xla_metadata(first, inlineable="false")         # goes to what makes the value, which is the call
  return first, *others
