"""What optimizer factories have in common: integers are structure, not numbers to schedule."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import numpy as np

# Annotations of integer arguments, as they are and as modules with postponed evaluation have them.
INTEGERS = (int, int | None, "int", "int | None")

Factory = TypeVar("Factory", bound=Callable[..., Any])


def static_integers(factory: Factory) -> Factory:
  """Lets optax.inject_hyperparams take a factory as it is: its integers (steps, sizes, periods)
  shape the program.

  inject_hyperparams makes arrays of Python's ints and floats, but not of numpy's integers: those
  are the defaults that it sees here. Errors: TypeError when an integer arrives as an array all the
  same."""
  signature = inspect.signature(factory)
  integers = [
    name for name, parameter in signature.parameters.items() if parameter.annotation in INTEGERS
  ]

  @functools.wraps(factory)
  def with_static_integers(*args: Any, **kwargs: Any) -> Any:
    for name in integers:
      value = kwargs.get(name)
      if isinstance(value, jax.Array):
        raise TypeError(
          f"{name}: must be a Python integer; give inject_hyperparams static_args={name!r}"
        )
      if value is not None:
        kwargs[name] = operator.index(value)
    return factory(*args, **kwargs)

  parameters = [
    p.replace(default=np.int64(p.default)) if type(p.default) is int else p
    for p in signature.parameters.values()
  ]
  with_static_integers.__signature__ = signature.replace(parameters=parameters)  # pyrefly: ignore[missing-attribute]
  return with_static_integers  # pyrefly: ignore[bad-return]


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
  """Errors: ValueError naming the argument, its value and the nearest that is allowed."""
  if value not in allowed:
    near = difflib.get_close_matches(str(value), list(allowed), n=1)
    raise ValueError(
      f"{name} = {value!r}: "
      + (f"did you mean {near[0]!r}? " if near else "")
      + "expected one of "
      + ", ".join(map(repr, allowed))
    )
