"""Predicted capacities: errors on N(0, 1) against Max's, and the paper's equation."""

import numpy as np
import pytest

from beyond_outliers import config, quant
from beyond_outliers.analysis import capacity


def error(bits):
  return capacity.gaussian_error(quant.RECIPES[f"quest_w{bits}a{bits}"].weights)


@pytest.mark.parametrize("bits, expected", [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_errors_of_uniform_grids_are_those_of_max(bits, expected):
  """J. Max, Quantizing for minimum distortion, 1960, table II: 2, 4, 8 and 16 even levels."""
  assert error(bits) == pytest.approx(expected, rel=0.01)


def test_absmax_has_a_larger_error_the_longer_its_rows():
  spec = quant.RECIPES["rtn_w4a4"].weights
  short, long = (capacity.gaussian_error(spec, width=width) for width in (128, 4096))
  assert error(4) < short < long


def test_the_curve_is_the_papers_equation():
  curve = capacity.CapacityCurve(F=0.5, C=1.5, L=0.9)
  assert curve(0.0) == pytest.approx(0.9) and curve(1.0) == curve(3.0) == 0
  assert curve(4.0**-3) == pytest.approx(0.9 * np.tanh(0.5 * 3) ** 1.5)
  assert np.all(np.diff(curve(np.linspace(0.001, 1, 50))) < 0)


def test_weights_and_activations_multiply():
  curve = capacity.CapacityCurve(F=0.5, C=1.5)
  both, one = quant.RECIPES["quest_w4a4"], quant.RECIPES["quest_w4a16"]
  assert capacity.predicted_capacity(one, curve) == pytest.approx(curve(error(4)))
  assert capacity.predicted_capacity(both, curve) == pytest.approx(curve(error(4)) ** 2)
  assert capacity.predicted_capacity(quant.RECIPES["none"]) == 1


def test_the_constants_are_those_of_figure_6():
  """arXiv 2506.01863, figure 6: last column and last row of the matrix of QuEST's capacities."""
  errors = [error(bits) for bits in (1, 2, 3, 4)]
  printed = np.array([0.21, 0.45, 0.74, 0.90, 0.21, 0.48, 0.76, 0.91])
  fitted = capacity.fit_capacity(errors * 2, printed)
  assert fitted == pytest.approx(capacity.QUEST_CURVE, abs=2e-3)
  assert np.abs(fitted(np.array(errors * 2)) - printed).max() < 0.05
  assert capacity.predicted_capacity(quant.RECIPES["quest_w4a4"]) == pytest.approx(0.78, abs=5e-3)


def test_what_no_normal_number_fits_is_refused():
  with pytest.raises(config.ConfigError, match=r"grid = 'unsigned': .* are signed"):
    capacity.predicted_capacity(quant.RECIPES["lsq_w4a4_unsigned"])
  with pytest.raises(config.ConfigError, match=r"recipe = 'rtn_w4a4'.*quant.RECIPES"):
    capacity.predicted_capacity("rtn_w4a4")
  with pytest.raises(config.ConfigError, match="at least three errors are needed"):
    capacity.fit_capacity([0.1, 0.2], [0.5, 0.4])
