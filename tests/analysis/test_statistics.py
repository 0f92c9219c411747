"""Standard errors of means, against scipy's."""

import math

import numpy as np
import pytest
from scipy import stats

from beyond_outliers.analysis.statistics import estimate


def test_a_mean_and_its_standard_error():
  values = [4.0, 4.4, 4.1, 3.7]
  assert estimate(values) == pytest.approx((np.mean(values), stats.sem(values)))


def test_one_value_has_no_standard_error():
  found = estimate([4.0])
  assert found.mean == 4.0 and math.isnan(found.stderr)
