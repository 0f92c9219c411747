"""Optax factories from sections of the configuration: `muon(learning_rate, *, momentum, ...)` from
a function that takes a `config.optimizers.Muon`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Collection
from inspect import Parameter
from typing import Any

import jax
import numpy as np
import optax

from beyond_outliers.config.checks import require
from beyond_outliers.config.hyperparameters import OneOf, Section, other_choice

Factory = Callable[..., optax.GradientTransformation]

# Types of the hyperparameters that shape the program; modules that postpone the evaluation of
# annotations have them as strings.
INTEGERS = (int, int | None, "int", "int | None")


def arguments_of(
  section: type[Section], *, without: Collection[str] = (), **fixed: Any
) -> Callable[[Factory], Factory]:
  """Decorator that turns f(h, *, axes, mesh), h being a section, into a factory in optax's style.

  Its arguments are learning_rate, f's own keywords, and as keywords the section's other
  hyperparameters, with official values as defaults and their descriptions appended to f's
  docstring. Those in `without` keep their official value instead, those in `fixed` the one given.
  Arrays, which may be traced, and schedules are not checked.

  optax.inject_hyperparams takes such a factory as it is. It turns Python's ints and floats into
  arrays, but not numpy's integers, so the integer defaults are those: integers (steps, sizes,
  periods) shape the program and must stay static.

  Errors, of the factory: ConfigError naming the argument, its value and the remedy; TypeError when
  an integer arrives as an array after all."""
  fields = {
    field.name: field
    for field in dataclasses.fields(section)
    if field.name not in {"name", *without, *fixed}
  }
  integers = [name for name, field in fields.items() if field.type in INTEGERS]

  def decorate(function: Factory) -> Factory:
    own = list(inspect.signature(function).parameters.values())[1:]
    signature = inspect.Signature(
      sorted([*own, *map(_parameter, fields.values())], key=lambda parameter: parameter.kind),
      return_annotation=optax.GradientTransformation,
    )

    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
      given = signature.bind(*args, **kwargs).arguments
      values = {name: value for name, value in given.items() if name in fields}
      for name, value in values.items():
        known = fields[name].metadata
        # None can be one of the choices: `ns_dtype` None is the state's type.
        optional = known["official"] is None or isinstance(known.get("rule"), OneOf)
        require(
          value is not None or optional,
          name,
          None,
          "expected a value; leave the argument out for the default",
        )
      values |= {name: _static(name, values[name]) for name in integers if name in values}
      h = section.given(name=function.__name__, **fixed, **values)
      return function(h, **{name: value for name, value in given.items() if name not in fields})

    factory.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_lines(fields.values())}"
    factory.__signature__ = signature  # pyrefly: ignore[missing-attribute]
    return factory

  return decorate


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
  """Refuses an unknown choice.

  Errors: ValueError naming the argument, its value and the closest that is allowed."""
  remedy = other_choice(value, allowed)
  if remedy is not None:
    raise ValueError(f"{name} = {value!r}: {remedy}")


def _parameter(field: dataclasses.Field[Any]) -> Parameter:
  if field.name == "learning_rate":
    return Parameter(field.name, Parameter.POSITIONAL_OR_KEYWORD)
  default = field.metadata["official"]
  if type(default) is int:
    default = np.int64(default)
  return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def _static(name: str, value: Any) -> int | None:
  if isinstance(value, jax.Array):
    raise TypeError(
      f"{name}: must be a Python integer; give inject_hyperparams static_args={name!r}"
    )
  return None if value is None else operator.index(value)


def _lines(fields: Collection[dataclasses.Field[Any]]) -> str:
  """Documentation of hyperparameters, one paragraph each."""
  paragraphs = []
  for field in fields:
    rule = field.metadata["rule"]
    choices = f" ({' | '.join(rule.choices)})" if isinstance(rule, OneOf) else ""
    text = f"{field.name}: {field.metadata['doc']}{choices}"
    paragraphs.append(textwrap.fill(text, 96, subsequent_indent="  "))
  return "\n".join(paragraphs)
