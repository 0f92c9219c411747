"""Fields of optimizers' sections: official values, rules, lines of documentation."""

import dataclasses
import math
from collections.abc import Iterator

import pytest

from beyond_outliers import config
from beyond_outliers.config import hyperparameters, optimizers
from beyond_outliers.config.hyperparameters import (
  Section,
  above_zero,
  at_least,
  below_one,
  fraction,
  official,
  one_of,
)


@dataclasses.dataclass(frozen=True)
class Example(Section):
  low: float = official(0.5, "the lower of two", at_least(0))
  high: float = official(1.0, "the higher of two", at_least(0))
  age: int = official(0, "younger than the others", younger=True)

  def conflicts(self) -> Iterator[tuple[str, str]]:
    if self.low > self.high:
      yield "low", f"expected at most high, {self.high}"


def test_a_configuration_gives_every_value_but_the_younger_ones():
  with pytest.raises(TypeError, match="high"):
    Example("example", 0.1, 0.5)
  assert Example("example", 0.1, 0.5, 1.0).age == 0


def test_the_others_are_official():
  assert Example.given(low=0.25) == Example("example", 1.0, 0.25, 1.0, 0)


@pytest.mark.parametrize("prefix", ["", "optimizer.groups.hidden."])
@pytest.mark.parametrize(
  "low, message",
  [
    (-0.5, "low = -0.5: expected at least 0"),
    (math.nan, "low = nan: expected a finite number"),
    (2.0, "low = 2.0: expected at most high, 1.0"),
  ],
)
def test_a_section_is_checked_by_its_rules(prefix, low, message):
  with pytest.raises(config.ConfigError) as error:
    Example("example", 0.1, low, 1.0).check(prefix)
  assert str(error.value) == prefix + message


@pytest.mark.parametrize(
  "rule, good, bad",
  [
    (at_least(1), [1, 2.5], [0, -1, math.inf, math.nan]),
    (at_least(0, most=3), [0, 3], [-1, 4]),
    (at_least(0, infinite=True), [0, math.inf], [-1, -math.inf, math.nan]),
    (above_zero("a share", 1), [0.1, 1], [0, -1, 1.5, math.nan]),
    (above_zero("a power"), [0.1, 5], [0, math.nan]),
    (below_one(), [0, 0.99], [1, -0.1, math.nan]),
    (fraction(), [0, 1], [1.1, -0.1, math.nan]),
    (one_of("a", "b"), ["a", "b"], ["c", ""]),
  ],
)
def test_rules(rule, good, bad):
  assert not any(rule(value) for value in good)
  for value in bad:
    assert rule(value).removeprefix("did you mean").startswith("expected ")


@pytest.mark.parametrize("section", optimizers.OPTIMIZERS.values())
def test_official_values_obey_the_rules_and_have_their_lines(section):
  assert section.given() == section.given().check()
  for field in dataclasses.fields(section):
    assert field.name == "name" or field.metadata["doc"], field.name


def test_a_remedy_for_a_word_names_the_nearest():
  assert hyperparameters.other_choice("eighh", ("eigh", "qr")).startswith("did you mean 'eigh'? ")
  assert hyperparameters.other_choice(0.9, ("eigh", "qr")) == "expected one of 'eigh', 'qr'"
