"""Correlations over few optimizers or runs: coefficients, exact p values, bootstrap intervals."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from beyond_outliers.analysis.statistics import Values, check_column, check_confidence
from beyond_outliers.config.checks import nearest, require

# Up to this many values, p enumerates all n! pairings; above, it is scipy's own.
EXACT_UP_TO = 9
RESAMPLES = 4999


@dataclasses.dataclass(frozen=True)
class Correlation:
  """A correlation coefficient of n pairs."""

  value: float
  interval: tuple[float, float]
  p: float  # two-sided, of no association
  n: int
  p_from: str  # how p was found


def correlation(
  x: Values,
  y: Values,
  method: str = "spearman",
  *,
  given: Values | None = None,
  clusters: Sequence[Any] | None = None,
  interval: str | None = None,
  confidence: float = 0.95,
  seed: int = 0,
) -> Correlation:
  """The association of paired values. method: a row of CORRELATIONS, pearson, spearman or kendall.

  given: a covariate, such as the loss in full precision, for the partial correlation: that of the
    residuals of x and y (for spearman, of their ranks) after linear regression on it. Not kendall.
  clusters: a label per pair, such as its optimizer or seed, if pairs with the same label are not
    independent. The bootstrap then draws clusters, and p permutes y's clusters as wholes, rows in
    the order given; p is NaN for a single cluster, and for clusters of different sizes.
  interval: of the bootstrap, "bca" (bias-corrected and accelerated) or "percentile"; by default bca
    for pearson, percentile for ranks, whose resamples take few values.
  p is exact up to EXACT_UP_TO pairs, or clusters: the share of all n! pairings with a coefficient
    as extreme, twice the smaller tail (scipy.stats.permutation_test). With more pairs, it is
    scipy's; with more clusters, of RESAMPLES random pairings. With `given`, spearman pairs y's
    residuals, regressed again (Freedman and Lane 1983); otherwise p is Student's t's with n - 3
    degrees of freedom, exact for normal values by pearson, nearly so by spearman.

  Coverage with few pairs: how often the 95 % interval contains .8 (.786 for ranks), the correlation
  of the normal distribution from which n pairs are drawn, 500 times, by `DRAWS=500 python -m
  pytest -s tests/analysis/test_correlations.py -k coverage`:

       n   pearson: bca  percentile   spearman: bca  percentile
       6           .936        .880            .938        .942
      12           .938        .918            .958        .990
      24           .924        .908            .936        .962

  For six pairs it is wide: by pearson it excludes zero in one draw of four, and p is below .05 in
  half. For ranks, bca sometimes spans all of -1 to 1.
  Errors: ConfigError for unequal lengths, values that are not finite or all equal, fewer than three
    pairs (four with `given`), and unknown names."""
  require(method in CORRELATIONS, "method", method, nearest(method, CORRELATIONS))
  coefficient = CORRELATIONS[method]
  interval = interval or coefficient.interval
  require(interval in INTERVALS, "interval", interval, nearest(interval, INTERVALS))
  check_confidence(confidence)
  columns = [
    check_column(name, v) for name, v in (("x", x), ("y", y), ("given", given)) if v is not None
  ]
  n, least = len(columns[0]), 3 if given is None else 4
  lengths = [len(column) for column in columns]
  require(set(lengths) == {n}, "x, y, given", lengths, "expected equal lengths")
  require(n >= least, "x", columns[0].tolist(), f"expected at least {least} values")
  for name, column in zip(("x", "y", "given"), columns, strict=False):
    require(
      np.ptp(column) > 0,
      name,
      float(column[0]),
      "all values are equal, so nothing can vary with them",
    )
  if given is not None:
    require(
      method != "kendall",
      "method",
      method,
      'partial correlations are not computed by it; use "pearson" or "spearman"',
    )
  found = float(coefficient.statistic(*columns))
  low, high = bootstrap_interval(
    coefficient.statistic,
    columns,
    clusters=clusters,
    interval=interval,
    confidence=confidence,
    seed=seed,
  )
  p, p_from = _p_value(coefficient, found, columns, clusters)
  return Correlation(found, (low, high), p, n, p_from)


def _pearson(*columns: np.ndarray) -> np.ndarray:
  """Pearson's coefficient along the last axis, given the third column if there is one; zero for
  columns that do not vary."""
  # Scaled by powers of two, which is exact, so that no square is out of range.
  exponents = [np.frexp(np.abs(v).max(axis=-1, keepdims=True))[1] for v in columns]
  columns = tuple(np.ldexp(v, -e) for v, e in zip(columns, exponents, strict=True))
  x, y, *given = (v - v.mean(axis=-1, keepdims=True) for v in columns)
  for z in given:
    norm = np.maximum((z * z).sum(axis=-1, keepdims=True), 1e-300)
    x, y = (v - z * ((v * z).sum(axis=-1, keepdims=True) / norm) for v in (x, y))
  scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
  largest_x, largest_y, *_ = (np.abs(v).max(axis=-1) for v in columns)
  tiny = 1e-14 * largest_x * largest_y + 1e-300
  r = np.where(scale > tiny, (x * y).sum(axis=-1) / np.where(scale > tiny, scale, 1), 0.0)
  return np.round(r, 12)  # so that the order of the pairs does not matter


def _spearman(*columns: np.ndarray) -> np.ndarray:
  return _pearson(*(stats.rankdata(column, axis=-1) for column in columns))


def _kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Kendall's tau-b along the last axis."""
  i, j = np.triu_indices(x.shape[-1], 1)
  signs = [np.sign(v[..., i] - v[..., j]) for v in (x, y)]
  scale = np.sqrt(np.prod([np.abs(sign).sum(axis=-1) for sign in signs], axis=0))
  return np.where(scale > 0, (signs[0] * signs[1]).sum(axis=-1) / np.maximum(scale, 1), 0.0)


class Coefficient(NamedTuple):
  """A kind of correlation: its value along the last axis of columns, scipy's test of two columns,
  and the kind of interval that is better for few pairs."""

  statistic: Callable[..., np.ndarray]
  test: Callable[..., Any]
  interval: str


CORRELATIONS: dict[str, Coefficient] = {
  "pearson": Coefficient(_pearson, stats.pearsonr, "bca"),
  "spearman": Coefficient(_spearman, stats.spearmanr, "percentile"),
  "kendall": Coefficient(_kendall, stats.kendalltau, "percentile"),
}
INTERVALS = {"percentile": "percentile", "bca": "BCa"}  # scipy's names


def _p_value(
  coefficient: Coefficient, found: float, columns: list[np.ndarray], clusters: Sequence[Any] | None
) -> tuple[float, str]:
  """(p, how it was found)."""
  x, y, *given = columns
  groups = [np.array([row]) for row in range(len(x))] if clusters is None else _rows(clusters)
  value_of, what = coefficient.statistic, "pairings"
  if given:
    if clusters is not None:
      return math.nan, "none: of clusters, given a covariate"
    if value_of is not _spearman or len(x) > EXACT_UP_TO:
      freedom = len(x) - 3
      t = found * math.sqrt(freedom / max(1 - found**2, 1e-300))
      return float(2 * stats.t.sf(abs(t), freedom)), f"Student's t, {freedom} degrees of freedom"
    # For ranks in perfect order, t would rule out chance however few the pairs.
    x, y, z = (stats.rankdata(column) for column in columns)
    y, given = y - np.polyval(np.polyfit(z, y, 1), z), [z]
    value_of, what = _pearson, "pairings of residuals"
  if len(groups) < 2:
    return math.nan, "none: a single cluster says nothing of others"
  if len({len(rows) for rows in groups}) > 1:
    return math.nan, "none: clusters are not of one size"
  if len(groups) > EXACT_UP_TO and clusters is None:
    return float(coefficient.test(x, y).pvalue), f"scipy.stats.{coefficient.test.__name__}"
  rows = np.stack(groups)

  def statistic(order, axis):
    picked = rows[order.astype(int)]  # [..., groups, rows of each]
    paired = y[picked].reshape(*order.shape[:-1], -1)
    x_again, *given_again = (
      np.broadcast_to(column[rows].ravel(), paired.shape) for column in (x, *given)
    )
    return value_of(x_again, paired, *given_again)

  test = stats.permutation_test(
    (np.arange(len(groups)),),
    statistic,
    permutation_type="pairings",
    vectorized=True,
    batch=20000,
    n_resamples=math.inf if len(groups) <= EXACT_UP_TO else RESAMPLES,
    rng=np.random.default_rng(0),
  )
  exact = len(groups) <= EXACT_UP_TO
  count = f"all {math.factorial(len(groups))}" if exact else f"{RESAMPLES} random"
  return float(test.pvalue), f"{count} {what}" + ("" if clusters is None else " of clusters")


def _rows(clusters: Sequence[Any]) -> list[np.ndarray]:
  """The rows of each cluster."""
  labels, index = np.unique(np.asarray([str(label) for label in clusters]), return_inverse=True)
  return [np.flatnonzero(index == k) for k in range(len(labels))]


def bootstrap_interval(
  statistic: Callable[..., Any],
  columns: Sequence[Values],
  *,
  clusters: Sequence[Any] | None = None,
  interval: str = "bca",
  confidence: float = 0.95,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> tuple[float, float]:
  """A bootstrap interval of a statistic of columns, by resampling their rows, or whole clusters of
  rows (scipy.stats.bootstrap).

  statistic: of columns [..., n], along the last axis. clusters: a label per row. NaN for fewer than
    two rows or clusters, and by "bca" where resamples do not vary."""
  arrays = [np.asarray(column, float) for column in columns]
  n = len(arrays[0])
  require(clusters is None or len(clusters) == n, "clusters", clusters, f"expected {n} labels")
  groups = [np.array([row]) for row in range(n)] if clusters is None else _rows(clusters)
  sizes = np.array([len(rows) for rows in groups])
  counts = np.arange(sizes.max()) < sizes[:, None]
  padded = np.zeros(counts.shape, int)  # rows of each group
  padded[counts] = np.concatenate(groups)
  if len(groups) < 2:
    return math.nan, math.nan

  def resampled(order, axis=-1):
    drawn = order.astype(int).reshape(-1, order.shape[-1])  # [resamples, groups]
    lengths, found = sizes[drawn].sum(axis=-1), np.empty(len(drawn))
    for length in np.unique(lengths):  # with clusters of unequal size, resamples differ in length
      alike = lengths == length
      rows = padded[drawn[alike]][counts[drawn[alike]]].reshape(-1, length)
      found[alike] = statistic(*(column[rows] for column in arrays))
    return found.reshape(order.shape[:-1])

  with warnings.catch_warnings(), np.errstate(all="ignore"):
    warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the result is NaN then
    found = stats.bootstrap(
      (np.arange(len(groups)),),
      resampled,
      vectorized=True,
      axis=-1,
      confidence_level=confidence,
      n_resamples=resamples,
      method=INTERVALS[interval],
      rng=np.random.default_rng(seed),
    ).confidence_interval
  return float(found.low), float(found.high)
