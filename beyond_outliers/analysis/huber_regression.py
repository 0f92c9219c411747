"""Huber regression of a nonlinear curve, for many sets of values at once.

Legend: B sets of values, or starts; M measured values; C cells, the distinct points of the curve;
P parameters. Float64 throughout, in numpy: about a thousand fits of a few dozen values per second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats

# (parameters [B, P]) -> (values [B, C], their derivatives [B, C, P]).
Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

MAX_ITERATIONS = 400
# A fit has converged when a step lowers its sum of losses by no more than this share of it.
TOLERANCE = 1e-11
DAMPING = 1e-3, 1e-10, 1e10  # initial, least, and that at which a fit gives up


@dataclasses.dataclass(frozen=True)
class Problem:
  """The sum over measured values of the Huber loss (Huber 1964) of r = value - curve: r²/2 up to
  |r| = delta, delta (|r| - delta/2) beyond.

  Solved by reweighted least squares with Levenberg-Marquardt damping, within bounds: the sum never
  rises, and where all |r| < delta the steps are Gauss-Newton's, damped."""

  curve: Curve
  cell_M: np.ndarray  # index of each value's cell
  lower_P: np.ndarray
  upper_P: np.ndarray
  delta: float

  def objective(self, values_BxM: np.ndarray, theta_BxP: np.ndarray) -> np.ndarray:
    """The sums of losses, [B]."""
    return self._loss(values_BxM - self.curve(theta_BxP)[0][:, self.cell_M])

  def _loss(self, r_BxM: np.ndarray) -> np.ndarray:
    size = np.abs(r_BxM)
    inside = np.minimum(size, self.delta)
    return np.sum(inside * (size - inside / 2), axis=1)

  def solve(
    self, values_BxM: np.ndarray, start_BxP: np.ndarray, held_BxP: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """(parameters [B, P], sums of losses [B]) from these starts.

    held: True where a parameter keeps its starting value."""
    theta = np.clip(start_BxP, self.lower_P, self.upper_P)
    B, M = len(theta), self.cell_M.size
    values = np.broadcast_to(values_BxM, (B, M))
    held = np.zeros(theta.shape, bool) if held_BxP is None else held_BxP
    first, least, most = DAMPING
    damping, objective, left = np.full(B, first), self.objective(values, theta), np.arange(B)
    floor = 1e-16 * self.delta**2 * M  # lets exact fits, whose sum goes to zero, converge
    for _ in range(MAX_ITERATIONS):
      before = objective[left]
      step = self._step(values[left], theta[left], held[left], damping[left])
      there = np.clip(theta[left] + step, self.lower_P, self.upper_P)
      after = self.objective(values[left], there)
      better = after <= before
      theta[left[better]], objective[left[better]] = there[better], after[better]
      damping[left] = np.clip(damping[left] * np.where(better, 0.2, 8.0), least, None)
      done = better & (before - after <= TOLERANCE * (before + floor))
      left = left[~done & (damping[left] < most)]
      if not left.size:
        break
    return theta, objective

  def _step(self, values, theta, held, damping):
    curve_BxC, J_BxCxP = self.curve(theta)
    r_BxM = values - curve_BxC[:, self.cell_M]
    weight_BxM = self.delta / np.maximum(np.abs(r_BxM), self.delta)
    sums = np.eye(curve_BxC.shape[1])[self.cell_M]  # [M, C]
    g_BxP = np.einsum("bcp,bc->bp", J_BxCxP, (weight_BxM * r_BxM) @ sums)
    H_BxPxP = np.swapaxes(J_BxCxP, 1, 2) @ (J_BxCxP * (weight_BxM @ sums)[..., None])
    # A parameter on its bound stays there while the descent direction points outwards.
    stays = held | ((theta <= self.lower_P) & (g_BxP < 0)) | ((theta >= self.upper_P) & (g_BxP > 0))
    H_BxPxP = np.where(stays[:, :, None] | stays[:, None, :], 0.0, H_BxPxP)
    diagonal = np.einsum("bpp->bp", H_BxPxP)
    scale = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    H_BxPxP = H_BxPxP / scale[:, :, None] / scale[:, None, :]
    np.einsum("bpp->bp", H_BxPxP)[...] = 1 + damping[:, None]
    solved = np.linalg.solve(H_BxPxP, (np.where(stays, 0.0, g_BxP) / scale)[..., None])[..., 0]
    return solved / scale

  def noise(self, values_M: np.ndarray, theta_P: np.ndarray) -> float:
    """The residuals' standard deviation, from their mean magnitude, on which outliers have less
    influence than on squares. The divisor is the mean of sqrt(M (M - P)), right for least squares,
    and M - P, right where delta is so small that the curve passes through P of the values."""
    M, P = self.cell_M.size, theta_P.size
    r_M = values_M - self.curve(theta_P[None])[0][0, self.cell_M]
    left = max(M - P, 1)
    return float(np.sqrt(np.pi / 2) * np.abs(r_M).sum() / ((np.sqrt(M * left) + left) / 2))

  def unit(self, noise: float) -> float:
    """How much larger, per degree of freedom, the sum is at the true parameters than at its minimum
    if residuals are normal: half of E ψ² / E ψ', ψ the loss's derivative (Ronchetti's test, Hampel
    et al. 1986, section 7.2). For least squares, half the variance."""
    c = self.delta / max(noise, self.delta / 30)  # no residual exceeds 30 deviations
    inside = 2 * stats.norm.cdf(c) - 1
    squares = inside - 2 * c * stats.norm.pdf(c) + 2 * c * c * stats.norm.sf(c)
    return float(noise**2 * squares / inside / 2)
