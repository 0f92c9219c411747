"""Means and differences over seeds, against scipy's and worked examples."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from beyond_outliers import config
from beyond_outliers.analysis.statistics import (
  compare_differences,
  estimate,
  holm,
  paired_difference,
)


def test_a_mean_and_its_standard_error():
  values = [4.0, 4.4, 4.1, 3.7]
  assert estimate(values) == pytest.approx((np.mean(values), stats.sem(values)))


def test_one_value_has_no_standard_error():
  found = estimate([4.0])
  assert found.mean == 4.0 and math.isnan(found.stderr)


BEFORE = [4.0, 4.4, 4.1, 3.7, 3.9, 4.2]
AFTER = [4.3, 4.5, 4.5, 3.9, 3.8, 4.6]


def test_a_paired_difference_is_scipys():
  found, test = paired_difference(BEFORE, AFTER), stats.ttest_rel(AFTER, BEFORE)
  assert found.value == pytest.approx(np.mean(np.subtract(AFTER, BEFORE))) and found.n == 6
  assert found.p == pytest.approx(test.pvalue)
  assert found.interval == pytest.approx(tuple(test.confidence_interval()))


def test_the_sign_flip_test_counts_all_signs():
  d = np.subtract(AFTER, BEFORE)
  means = [np.mean(d * signs) for signs in itertools.product((1, -1), repeat=len(d))]
  larger = np.mean([mean >= d.mean() - 1e-12 for mean in means])
  assert paired_difference(BEFORE, AFTER).p_sign_flip == pytest.approx(2 * larger)
  clear = paired_difference([4.0, 4.1, 4.2], [5.0, 5.2, 5.1])
  assert clear.p_sign_flip == 2 / 2**3, "three seeds can show no more"


def test_pairs_go_by_seed():
  first, second = {0: 4.0, 1: 4.4, 2: 4.1}, {2: 4.2, 0: 4.3, 1: 4.5}
  assert paired_difference(first, second) == paired_difference([4.0, 4.4, 4.1], [4.3, 4.5, 4.2])
  with pytest.raises(config.ConfigError, match=r"seeds = \[3\]: are on one side only"):
    paired_difference(first, {**second, 3: 4.0})
  with pytest.raises(config.ConfigError, match="one has seeds, the other has none"):
    paired_difference(first, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
  "first, second, message",
  [
    ([1.0], [2.0], "first = .*expected at least two seeds"),
    ([1.0, 2.0], [2.0], "expected equal lengths"),
    ([1.0, math.nan], [2.0, 3.0], "first = .*expected finite numbers"),
    ([1.0, 2.0], [2.0, math.inf], "second = .*expected finite numbers"),
    (["a", "b"], [1.0, 2.0], r"first = \['a', 'b'\]: expected a list of numbers"),
  ],
)
def test_what_does_not_pair_is_refused(first, second, message):
  with pytest.raises(config.ConfigError, match=message):
    paired_difference(first, second)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_a_level_that_is_none_is_refused(confidence):
  with pytest.raises(config.ConfigError, match=r"confidence = .*expected a number between 0 and 1"):
    paired_difference([1.0, 2.0], [2.0, 4.0], confidence)
  with pytest.raises(config.ConfigError, match=r"confidence = .*expected a number between 0 and 1"):
    compare_differences({"a": [1.0, 2.0]}, confidence=confidence)
  with pytest.raises(config.ConfigError, match=r"p_values = \[0.1, 1.2\]: expected fractions"):
    holm([0.1, 1.2])


def test_equal_differences_have_no_spread():
  found = paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
  assert (found.value, found.interval, found.p) == (0.5, (0.5, 0.5), 0.0)
  assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_holms_correction():
  """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
  assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_a_tie_is_an_interval_that_holds_zero():
  """However many differences are judged, and however they come out."""
  for draw in range(60):
    rng = np.random.default_rng(draw)
    differences = {
      f"{k}": rng.normal(rng.choice([0, 0.3, 1, 3]), 1, rng.integers(3, 7)) for k in range(5)
    }
    found = compare_differences(differences)
    assert [one.tie for one in found] == [one.interval[0] <= 0 <= one.interval[1] for one in found]
    assert [one.tie for one in found] == [one.p > 0.05 for one in found]
    assert {one.name for one in found} == set(differences)
    assert [one.p for one in found] == sorted(one.p for one in found)


def test_one_difference_alone_is_not_corrected():
  (found,), plain = compare_differences({"gap": AFTER}), paired_difference(np.zeros(6), AFTER)
  assert (found.interval, found.p, found.n) == (plain.interval, plain.p, 6) and not found.tie


def test_a_tie_is_not_yet_equivalence():
  seeds = np.array([-1.0, 1.1, -0.9, 1.0, 0.1])
  wide, narrow = compare_differences({"wide": seeds, "narrow": 1e-3 * seeds}, margin=0.01)
  assert {one.name: (one.tie, one.equivalent) for one in (wide, narrow)} == {
    "wide": (True, False),
    "narrow": (True, True),
  }
  assert compare_differences({"wide": seeds})[0].equivalent is None
  with pytest.raises(config.ConfigError, match="margin = 0: expected a number above zero"):
    compare_differences({"wide": seeds}, margin=0)
