"""Confidence intervals of a law's parameters: by profile likelihood, and by bootstrap over seeds.

Coverage of 95 % intervals, with true A 400, alpha .34, E 1.7, rho .86 (two_term: B 900, beta .3),
the study's sizes and normal noise of log losses: how often they contain the truth in 200 draws (100
for two_term), as the mean over the parameters and the least and largest of them.

    runs of one optimizer in full precision and under a recipe      profile             bootstrap
    4 sizes, 3 seeds, noise .005                               .94 (.93 to .96)    .94 (.94 to .95)
    5 sizes to 769M, 3 seeds, .002                             .94 (.93 to .95)    .95 (.93 to .96)
    6 sizes, 3 seeds, .003, shared=()                          .93 (.93 to .94)    .94 (.93 to .94)
    6 sizes, 1 seed, .003: 12 runs                             .97 (.94 to .99)    .96 (.93 to .98)
    6 sizes, 3 seeds, .003; of three optimizers                .93 (.93 to .96)    .95 (.93 to .96)
    two_term, 4 sizes at 4 ratios, 3 seeds, .003               .95 (.94 to .96)    .95 (.93 to .99)

`DRAWS=200 python -m pytest -s tests/analysis/test_scaling_law.py -k coverage` prints the first row;
its function `coverage`, with other arguments, the others. Where the law does not hold, profiles
widen with the residuals; the bootstrap does not, since it draws seeds around their own mean.

Legend: M runs, P parameters, as in huber_regression.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from beyond_outliers.analysis.huber_regression import Problem


def profile_interval(
  problem: Problem, values_M: np.ndarray, theta_P: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
  """Intervals by profile likelihood: values of a parameter for which the others can make up.

  Returns (ends [P, 2], best parameters met [P]); an end that reaches a bound is the bound. A value
  is inside if the least sum of losses given that value exceeds the global minimum by at most `unit`
  times the F quantile with 1 and M - P degrees of freedom. Where the data do not determine a
  parameter, the profile is flat and reaches a bound."""
  M, P = problem.cell_M.size, theta_P.size
  least = float(problem.objective(values_M[None], theta_P[None])[0])
  noise = problem.noise(values_M, theta_P)
  rise = problem.unit(noise) * stats.f.ppf(confidence, 1, max(M - P, 1))
  which, sign = np.tile(np.arange(P), 2), np.repeat([-1.0, 1.0], P)
  rows, end = np.arange(2 * P), np.where(sign < 0, problem.lower_P[which], problem.upper_P[which])
  held = np.eye(P, dtype=bool)[which]
  inside, outside = theta_P[which].copy(), end.copy()  # brackets of the ends
  warm, best, best_sum = np.tile(theta_P, (2 * P, 1)), theta_P, least
  reach = np.maximum(1e-3 * np.abs(inside), 1e-4)  # the step outwards, doubled each time
  bracketed = np.zeros(2 * P, bool)
  height = np.zeros(2 * P), np.full(2 * P, np.nan)  # sqrt of the rise at `inside`, at `outside`
  open_ = np.ones(2 * P, bool)
  for _ in range(60):
    (left,) = np.nonzero(open_)
    if not left.size:
      break
    stepped = inside[left] + sign[left] * reach[left]
    stepped = np.where(
      sign[left] < 0, np.maximum(stepped, end[left]), np.minimum(stepped, end[left])
    )
    # The square root of a parabolic rise is linear, so: secant steps, kept off the brackets' ends.
    low, high = height[0][left], height[1][left]
    share = np.clip((np.sqrt(rise) - low) / np.maximum(high - low, 1e-300), 0.1, 0.9)
    secant = inside[left] + share * (outside[left] - inside[left])
    tried = np.where(bracketed[left], secant, stepped)
    start = warm[left].copy()
    start[np.arange(left.size), which[left]] = tried
    found, sums = problem.solve(values_M[None], start, held[left])
    if sums.min() < best_sum:
      best, best_sum = found[np.argmin(sums)], float(sums.min())
    root = np.sqrt(np.maximum(sums - least, 0))
    beyond = sums - least > rise
    inner, outer = left[~beyond], left[beyond]
    inside[inner], height[0][inner], warm[inner] = tried[~beyond], root[~beyond], found[~beyond]
    outside[outer], height[1][outer], bracketed[outer] = tried[beyond], root[beyond], True
    reach[inner] *= 2
    at_bound = ~bracketed & (inside == end)
    narrow = np.abs(outside - inside) <= 1e-3 * np.abs(outside - theta_P[which]) + 1e-12
    open_ = open_ & ~at_bound & ~(bracketed & narrow)
  middle = np.where(bracketed, (inside + outside) / 2, inside)
  return np.stack([middle[rows < P], middle[rows >= P]], axis=1), best


def bootstrap_refits(
  problem: Problem,
  values_M: np.ndarray,
  theta_P: np.ndarray,
  confidence: float,
  resamples: int,
  seed: int,
) -> tuple[np.ndarray, str]:
  """(parameters refitted to resampled runs [resamples, P], what was resampled, in words).

  Seeds are drawn within their (optimizer, recipe, N, D), around their mean, which need not lie on
  the law; where there is only one, around the law, from the residuals of all runs. Deviations are
  widened by sqrt(n / (n - 1)), by which n seeds spread less than their distribution, or for P
  fitted parameters by sqrt(M / (M - P)); and by Student's t quantile over the normal one, so that
  percentiles are right for few seeds."""
  cell_M, M, P = problem.cell_M, values_M.size, theta_P.size
  counts = np.bincount(cell_M)
  curve_M = problem.curve(theta_P[None])[0][0, cell_M]
  center_M = np.where(counts[cell_M] > 1, (np.bincount(cell_M, values_M) / counts)[cell_M], curve_M)
  spread_M = np.where(counts > 1, np.sqrt(counts / np.maximum(counts - 1, 1)), 0)[cell_M]
  residual_M = (values_M - curve_M) * math.sqrt(M / (M - P))
  draw = np.random.default_rng(seed)
  order = np.argsort(cell_M, kind="stable")  # the runs of each cell in succession
  first = (np.cumsum(counts) - counts)[cell_M]
  picked = order[first + draw.integers(0, counts[cell_M], (resamples, M))]
  deviation = spread_M * (values_M[picked] - center_M)
  alone = counts[cell_M] == 1
  deviation[:, alone] = (residual_M - residual_M.mean())[
    draw.integers(0, M, (resamples, alone.sum()))
  ]
  # Degrees of freedom of the spread: of seeds around their means, or of residuals.
  known = M - P if alone.any() else M - len(counts)
  tail = (1 + confidence) / 2
  deviation *= stats.t.ppf(tail, known) / stats.norm.ppf(tail)
  thetas, _ = problem.solve(center_M + deviation, np.tile(theta_P, (resamples, 1)))
  if not alone.any():
    return thetas, "seeds within (optimizer, recipe, N, D)"
  share = f"{alone.sum()} of {len(counts)} (optimizer, recipe, N, D) have one seed"
  return thetas, f"seeds, and residuals of the fit where {share}"


def between_seeds(values_M: np.ndarray, cell_M: np.ndarray) -> float:
  """Pooled standard deviation of seeds around their means; NaN where every cell has one seed."""
  counts = np.bincount(cell_M)
  means = np.bincount(cell_M, values_M) / counts
  freedom = values_M.size - counts.size
  return math.sqrt(((values_M - means[cell_M]) ** 2).sum() / freedom) if freedom else math.nan
