"""Hyperparameters as fields of a section, each with an official value, a meaning and a rule."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Collection, Iterator
from typing import Any, Self

from beyond_outliers.config.checks import require

Rule = Callable[[Any], str | None]  # value -> the remedy, or None if the value is allowed


def official(value: Any, doc: str, rule: Rule | None = None, *, younger: bool = False) -> Any:
  """A field of a section. Its official implementation's value is the default in the factory.

  Configurations have no defaults and must give every value, except for a field that is `younger`
  than recorded runs: these did what its official value does."""
  metadata = {"official": value, "doc": doc, "rule": rule}
  if younger:
    return dataclasses.field(default=value, metadata=metadata)
  return dataclasses.field(metadata=metadata)


def at_least(
  bound: float, hint: str = "", *, infinite: bool = False, most: float = math.inf
) -> Rule:
  """Rule: a finite number of at least `bound`. infinite: also allow infinity, for no limit."""

  def rule(value: float) -> str | None:
    if not math.isfinite(value) and not (infinite and value == math.inf):
      return "expected a finite number"
    if value > most:
      return f"expected at most {most}{hint}"
    return None if value >= bound else f"expected at least {bound}{hint}"

  return rule


def above_zero(what: str, most: float = math.inf) -> Rule:
  """Rule: a number above zero, up to `most`; for a value that may also be None."""
  bounds = "above 0" if most == math.inf else f"above 0 and at most {most}"
  return lambda value: None if 0 < value <= most else f"expected {what}, {bounds}, or None"


def below_one(hint: str = "") -> Rule:
  return lambda value: None if 0 <= value < 1 else f"expected a number from 0 to below 1{hint}"


def fraction() -> Rule:
  return lambda value: None if 0 <= value <= 1 else "expected a fraction, 0 to 1"


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Rule for a word: one of the choices, which documentation lists."""

  choices: tuple[str, ...]

  def __call__(self, value: Any) -> str | None:
    return other_choice(value, self.choices)


def one_of(*choices: str) -> Rule:
  return OneOf(choices)


def other_choice(value: Any, choices: Collection[str]) -> str | None:
  """The remedy for a word that is not one of the choices, with the nearest; None if it is one."""
  if value in choices:
    return None
  near = difflib.get_close_matches(str(value), list(choices), n=1)
  question = f"did you mean {near[0]!r}? " if near else ""
  return f"{question}expected one of {', '.join(map(repr, choices))}"


def is_number(value: Any) -> bool:
  """Whether a value is a plain number, and not an array, which may be traced, or a schedule."""
  return isinstance(value, numbers.Real)


@dataclasses.dataclass(frozen=True)
class Section:
  """Hyperparameters of one optimizer; subclasses add their own."""

  name: str
  learning_rate: float = official(1.0, "of the whole step; may be a schedule", at_least(0))

  @property
  def period(self) -> int:
    """Number of steps after which the optimizer's costs repeat."""
    return 1

  def conflicts(self) -> Iterator[tuple[str, str]]:
    """(hyperparameter, remedy) for each value that is allowed, but not together with others."""
    return iter(())

  def check(self, prefix: str = "") -> Self:
    """Checks the section and returns it. Only words and plain numbers are checked.

    Errors: ConfigError naming `prefix` and the hyperparameter, the value and the remedy."""
    for field in dataclasses.fields(self):
      value, rule = getattr(self, field.name), field.metadata.get("rule")
      if rule is not None and (isinstance(value, str) or is_number(value)):
        word = isinstance(value, str) and not isinstance(rule, OneOf)
        remedy = "expected a number" if word else rule(value)
        require(remedy is None, prefix + field.name, value, str(remedy))
    for name, remedy in self.conflicts():
      require(False, prefix + name, getattr(self, name), remedy)
    return self

  @classmethod
  def given(cls, **changes: Any) -> Self:
    """A section of the official implementation's values, except for `changes`; checked."""
    values: dict[str, Any] = {
      field.name: field.metadata["official"]
      for field in dataclasses.fields(cls)
      if "official" in field.metadata
    }
    values |= {"name": cls.__name__.lower(), **changes}
    return cls(**values).check()
