"""Capacity of a recipe, predicted from its grids: the share rho of its size that a model is worth.

By arXiv 2506.01863, equation 3 and section 4.3,

    rho(R) = L tanh(F log_1/4 GMSE(R))^C
    rho(weights and activations) = rho(weights) rho(activations)

GMSE(R) is the mean squared error of the representation R on N(0, 1). L, F and C are fitted to
measured rho for each kind of representation (scalar grids, vector grids, sparse ones); L is 1 for
kinds that lose nothing at many bits. The paper does not print their values. The prediction is the
same for all optimizers, whereas the rho that `scaling_law.fit` measures differs between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from beyond_outliers import quant
from beyond_outliers.config.checks import require
from beyond_outliers.quant.recipes import check_recipe


class CapacityCurve(NamedTuple):
  """L, F and C of the equation."""

  F: float
  C: float
  L: float = 1.0

  def __call__(self, error: float | np.ndarray) -> np.ndarray:
    """rho at a mean squared error on N(0, 1): L at an error of 0, and 0 at 1 or more."""
    bits = -np.log(np.clip(error, 1e-300, 1.0)) / math.log(4)
    return self.L * np.tanh(self.F * bits) ** self.C


# Our fit, by `fit_capacity`, to the two-decimal values in the paper's figure 6 for QuEST at 1, 2, 3
# and 4 bits: weights alone .21 .45 .74 .90, activations alone .21 .48 .76 .91. It is off by up to
# .05 there; its products are up to .07 below the figure's values for both operands: W4A4 .78, where
# .85 was measured. It is good for ranking grids; for more, fit measurements.
QUEST_CURVE = CapacityCurve(F=0.505, C=1.616)


def predicted_capacity(
  recipe: quant.Recipe, curve: CapacityCurve = QUEST_CURVE, *, width: int = 1024
) -> float:
  """rho of a recipe's weights times that of its activations, by its last rule; 1 for an operand in
  full precision. Errors: ConfigError as `gaussian_error`, and for what is not a Recipe."""
  check_recipe(recipe)
  specs = [spec for spec in (recipe.weights, recipe.activations) if spec is not None]
  return math.prod(float(curve(gaussian_error(spec, width=width))) for spec in specs)


def gaussian_error(
  spec: quant.QuantSpec, *, width: int = 1024, rows: int = 256, seed: int = 0
) -> float:
  """The mean squared error of quantizing `rows` rows of `width` numbers drawn from N(0, 1); its
  standard error is below half a percent.

  width: of the contraction axis; absmax grows with it. Rotations, which don't change N(0, 1), are
    left out; for a scale that training would learn, the one of least error is taken.
  Errors: ConfigError for the grid "unsigned", which normal numbers do not fit."""
  require(
    spec.grid != "unsigned",
    "grid",
    spec.grid,
    "numbers from N(0, 1) are signed; use the recipe's grid for signed values",
  )
  spec = dataclasses.replace(spec, rotation="none", rounding="nearest")
  if spec.scale == "learned":
    spec = dataclasses.replace(spec, scale="mse", estimator="ste")
  x = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
  error = jax.jit(quant.fake_quantize, static_argnums=1)(jnp.asarray(x), spec) - x
  return float(np.mean(np.square(error, dtype=np.float64)))


def fit_capacity(errors: Sequence[float], rho: Sequence[float]) -> CapacityCurve:
  """F and C, with L = 1, fitted by least squares to rho measured at errors on N(0, 1).

  errors: of one operand, with the other in full precision. Errors: ConfigError for fewer than
  three."""
  require(
    len(errors) >= 3,
    "errors",
    list(errors),
    "at least three errors are needed to fit two constants",
  )

  def residuals(constants):
    return CapacityCurve(*constants)(np.asarray(errors)) - np.asarray(rho)

  F, C = optimize.least_squares(residuals, [0.5, 1.5], bounds=(1e-3, 20)).x
  return CapacityCurve(float(F), float(C))
