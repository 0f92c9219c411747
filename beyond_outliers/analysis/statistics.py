"""Means, and differences of means, of values from one seed each."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from beyond_outliers.config.checks import require
from beyond_outliers.errors import ConfigError

Values = Sequence[float] | np.ndarray

# Up to this many seeds the sign-flip test enumerates all 2^n signs; above, it draws 2^16 at random.
MOST_FLIPPED = 16


class Estimate(NamedTuple):
  """A mean and its standard error."""

  mean: float
  stderr: float  # of the mean; NaN for one value


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
  """The mean of independent values, [n], and s / sqrt(n) with the standard deviation s of n - 1."""
  n = len(values)
  stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
  return Estimate(float(np.mean(values)), stderr)


@dataclasses.dataclass(frozen=True)
class Difference:
  """A mean of n paired differences."""

  value: float
  interval: tuple[float, float]  # Student's t
  p: float  # of the paired t test, two-sided
  p_sign_flip: float  # of the sign-flip test; at least 2 / 2^n
  n: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One of several differences, judged together."""

  name: str
  value: float
  interval: tuple[float, float]  # at the level of its step in Holm's procedure
  p: float  # after Holm
  n: int
  tie: bool  # the interval holds zero
  equivalent: bool | None  # the interval lies within the margin; None without one


def paired_difference(
  first: Values | Mapping[int, float],
  second: Values | Mapping[int, float],
  confidence: float = 0.95,
) -> Difference:
  """second - first, paired by seed: lists in the same order, or {seed: value} with the same seeds.

  With few seeds the sign-flip test cannot be significant, however clear the difference: for .05 it
  takes six.
  Errors: ConfigError for seeds on one side only, values that are not finite, fewer than two."""
  if isinstance(first, Mapping) and isinstance(second, Mapping):
    alone = sorted(set(first) ^ set(second), key=str)
    require(not alone, "seeds", alone, "are on one side only; give both sides the same seeds")
    first, second = list(first.values()), [second[seed] for seed in first]
  elif isinstance(first, Mapping) or isinstance(second, Mapping):
    raise ConfigError("first, second: one has seeds, the other has none; give {seed: value} twice")
  a, b = check_column("first", first), check_column("second", second)
  require(len(a) == len(b), "first, second", (len(a), len(b)), "expected equal lengths")
  require(len(a) >= 2, "first", a.tolist(), "expected at least two seeds")
  check_confidence(confidence)
  d = b - a
  test = stats.ttest_rel(b, a) if np.ptp(d) > 0 else None
  low, high = test.confidence_interval(confidence) if test else (d[0], d[0])
  p = float(test.pvalue) if test else float(d[0] == 0)
  flips = stats.permutation_test(
    (d,),
    np.mean,
    permutation_type="samples",
    vectorized=True,
    n_resamples=2**MOST_FLIPPED,
    rng=np.random.default_rng(0),
  )
  return Difference(float(d.mean()), (float(low), float(high)), p, float(flips.pvalue), len(d))


def check_column(name: str, values: Values) -> np.ndarray:
  """Values as an array, [n]. Errors: ConfigError for what is not a list of finite numbers."""
  try:
    column = np.asarray(values, float)
  except (TypeError, ValueError):
    raise ConfigError(f"{name} = {values!r}: expected a list of numbers") from None
  require(column.ndim == 1, name, column.shape, "expected a list of numbers")
  require(bool(np.isfinite(column).all()), name, column.tolist(), "expected finite numbers")
  return column


def check_confidence(confidence: float) -> None:
  """Refuses what is not a confidence level. Errors: ConfigError."""
  require(0 < confidence < 1, "confidence", confidence, "expected a number between 0 and 1")


def holm(p_values: Values) -> np.ndarray:
  """p values of several tests after Holm's correction (Scand. J. Statist. 6, 1979): the chance of
  any false rejection among them stays below the level."""
  p = check_column("p_values", p_values)
  require(bool(((p >= 0) & (p <= 1)).all()), "p_values", p.tolist(), "expected fractions, 0 to 1")
  order = np.argsort(p, kind="stable")
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
  return adjusted


def compare_differences(
  differences: Mapping[str, Values], *, confidence: float = 0.95, margin: float | None = None
) -> list[Comparison]:
  """Which of several mean differences are ties. differences: by name, one per seed.

  A difference is a tie if its t test's p, after Holm's correction, is above 1 - confidence. Its
  interval then contains zero: intervals are at the level of the step at which Holm's procedure
  judges a difference; after the first tie, at that tie's level. A tie means that the seeds do not
  tell the sides apart, `equivalent` that these are the same up to the margin. Errors: ConfigError
  for a difference with fewer than two values, or values that are not finite."""
  require(bool(differences), "differences", dict(differences), "expected at least one")
  require(margin is None or margin > 0, "margin", margin, "expected a number above zero")
  check_confidence(confidence)
  found = {
    name: paired_difference(np.zeros(len(values)), values) for name, values in differences.items()
  }
  adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
  ordered, level = sorted(found, key=lambda name: found[name].p), 1 - confidence
  rejected = sum(adjusted[name] <= level for name in ordered)
  judged = []
  for step, name in enumerate(ordered):
    n = found[name].n
    share = level / (len(ordered) - min(step, rejected))
    low, high = paired_difference(np.zeros(n), differences[name], 1 - share).interval
    inside = None if margin is None else max(-low, high) < margin
    judged.append(
      Comparison(
        name, found[name].value, (low, high), float(adjusted[name]), n, step >= rejected, inside
      )
    )
  return judged


def compare_pairs(values: Mapping[str, Mapping[int, float]]) -> list[Comparison]:
  """Which of several things seeds tell apart: every pair, paired by seed, the surest first.

  values: by name, a value per seed. Pairs that share fewer than two seeds are left out."""
  pairs = {
    f"{a} - {b}": [values[a][seed] - values[b][seed] for seed in values[a] if seed in values[b]]
    for b, a in itertools.combinations(values, 2)
  }
  several = {name: differences for name, differences in pairs.items() if len(differences) > 1}
  return compare_differences(several) if several else []
