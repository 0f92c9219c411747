"""Means with standard errors, of values that one seed each gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
  """A mean and its standard error."""

  mean: float
  stderr: float  # of the mean; NaN for one value


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
  """The mean of independent values, [n], and s / sqrt(n) with the standard deviation s of n - 1."""
  n = len(values)
  stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
  return Estimate(float(np.mean(values)), stderr)
