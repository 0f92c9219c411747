"""Correlations against scipy's, exact p against all pairings, and coverage with six pairs."""

import itertools
import math
import os

import numpy as np
import pytest
from scipy import stats

from beyond_outliers import config
from beyond_outliers.analysis.correlations import CORRELATIONS, bootstrap_interval, correlation

X = np.array([2.1, 3.5, 1.2, 8.0, 4.4, 5.9])  # of six optimizers
Y = np.array([0.3, 0.1, 0.2, 0.9, 0.35, 0.7])
Z = np.array([3.1, 2.8, 3.3, 2.9, 3.0, 2.7])
SCIPY = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}


@pytest.mark.parametrize("method", SCIPY)
def test_coefficients_are_scipys_with_ties_too(method):
  for y in (Y, np.round(Y, 1)):
    assert correlation(X, y, method).value == pytest.approx(SCIPY[method](X, y).statistic)


@pytest.mark.parametrize("method", SCIPY)
@pytest.mark.parametrize("y", [Y, np.round(Y, 1)], ids=["", "ties"])
def test_p_is_the_share_of_all_pairings(method, y):
  found = correlation(X, y, method)
  values = np.array([SCIPY[method](X, p).statistic for p in itertools.permutations(y)])
  sides = [np.mean(sign * values >= sign * found.value - 1e-9) for sign in (1, -1)]
  assert found.p == pytest.approx(min(2 * min(sides), 1)) and found.p_from == "all 720 pairings"


def test_kendalls_p_is_scipys_exact_one():
  expected = stats.kendalltau(X, Y, method="exact").pvalue
  assert correlation(X, Y, "kendall").p == pytest.approx(expected)


@pytest.mark.parametrize("method", SCIPY)
def test_with_many_pairs_p_is_scipys(method):
  x, y = np.random.default_rng(0).normal(size=(2, 14))
  found = correlation(x, y, method)
  assert found.p == pytest.approx(SCIPY[method](x, y).pvalue) and found.n == 14
  assert found.p_from.startswith("scipy.stats.")


def test_partial_correlation_is_that_of_residuals():
  design = np.stack([np.ones(6), Z], axis=1)
  rest = [v - design @ np.linalg.lstsq(design, v)[0] for v in (X, Y)]
  found = correlation(X, Y, "pearson", given=Z)
  assert found.value == pytest.approx(stats.pearsonr(*rest).statistic)
  r, rx, ry = (stats.pearsonr(a, b).statistic for a, b in ((X, Y), (X, Z), (Y, Z)))
  assert found.value == pytest.approx((r - rx * ry) / math.sqrt((1 - rx**2) * (1 - ry**2)))
  ranks = [stats.rankdata(v) for v in (X, Y, Z)]
  by_ranks = correlation(*ranks[:2], "pearson", given=ranks[2])
  assert correlation(X, Y, "spearman", given=Z).value == pytest.approx(by_ranks.value)


def test_p_of_a_partial_correlation_is_that_of_the_regression():
  """The t of a coefficient in the regression of y on x and the covariate."""
  design = np.stack([np.ones(6), X, Z], axis=1)
  coefficients, squares, *_ = np.linalg.lstsq(design, Y)
  stderr = np.sqrt(squares[0] / 3 * np.linalg.inv(design.T @ design)[1, 1])
  expected = 2 * stats.t.sf(abs(coefficients[1] / stderr), 3)
  assert correlation(X, Y, "pearson", given=Z).p == pytest.approx(expected)


def test_p_of_a_partial_correlation_of_ranks_counts_pairings_of_residuals():
  """So that p of a perfect order of five is right: one in sixty, not 1e-300."""
  x, y, z = np.array([[1, 2, 3, 4, 5], [2, 1, 3, 5, 4], [1, 3, 2, 5, 4]], float)
  design = np.stack([np.ones(5), z], axis=1)

  def rest(v):
    return v - design @ np.linalg.lstsq(design, v)[0]

  residuals = rest(y)
  values = [
    np.corrcoef(rest(x), rest(residuals[list(order)]))[0, 1]
    for order in itertools.permutations(range(5))
  ]
  found = correlation(x, y, "spearman", given=z)
  side = np.mean(np.array(values) * np.sign(found.value) >= abs(found.value) - 1e-9)
  assert (
    found.p == pytest.approx(min(2 * side, 1)) and found.p_from == "all 120 pairings of residuals"
  )
  perfect = correlation(x, x**3, "spearman", given=z)
  assert perfect.value == 1 and perfect.p >= 2 / 120


@pytest.mark.parametrize("interval", ["percentile", "bca"])
def test_clusters_of_equal_rows_count_once(interval):
  """An optimizer's seeds that all agree add nothing; rows drawn one by one would count as more."""
  x, y, names = (np.repeat(v, 3) for v in (X, Y, list("abcdef")))
  once = correlation(X, Y, "pearson", interval=interval)
  clustered = correlation(x, y, "pearson", clusters=names, interval=interval)
  assert clustered.value == pytest.approx(once.value)
  assert clustered.interval == pytest.approx(once.interval) and clustered.p == once.p
  assert clustered.p_from == "all 720 pairings of clusters"
  low, high = correlation(x, y, "pearson", interval=interval).interval
  assert high - low < 0.8 * (once.interval[1] - once.interval[0])


def test_clusters_of_other_sizes_have_an_interval_and_no_p():
  names = ["a", "a", "b", "b", "c", "d"]
  found = correlation(X, Y, "pearson", clusters=names)
  assert -1 <= found.interval[0] < found.value < found.interval[1] <= 1 and math.isnan(found.p)
  assert found.p_from == "none: clusters are not of one size"
  assert all(map(math.isnan, bootstrap_interval(np.mean, [X], clusters=["a"] * 6)))


def test_the_bootstrap_of_a_mean_is_scipys():
  rng = np.random.default_rng(0)
  expected = stats.bootstrap((X,), np.mean, n_resamples=999, method="BCa", rng=rng)

  def mean(v):
    return v.mean(axis=-1)

  found = bootstrap_interval(mean, [X], interval="bca", resamples=999)
  assert found == pytest.approx(tuple(expected.confidence_interval))


@pytest.mark.parametrize("unit", [1e-160, 1e300, 5e-324])
def test_pearsons_coefficient_is_the_same_in_any_unit(unit):
  x, y = [1, 2, 3, 4], [1, 3, 2, 4]
  assert correlation(np.multiply(x, unit), y, "pearson").value == 0.8


@pytest.mark.parametrize(
  "x, y, options, message",
  [
    (X, Y[:5], {}, r"x, y, given = \[6, 5\]: expected equal lengths"),
    (X[:2], Y[:2], {}, "expected at least 3 values"),
    (X[:3], Y[:3], {"given": Z[:3]}, "expected at least 4 values"),
    (X, np.ones(6), {}, "y = .*1.0.*: all values are equal"),
    (X, [*Y[:5], math.nan], {}, "y = .*nan.*: expected finite numbers"),
    (X, Y, {"method": "cosine"}, "method = 'cosine': expected one of pearson, spearman, kendall"),
    (X, Y, {"interval": "t"}, "interval = 't': expected one of percentile, bca"),
    (X, Y, {"method": "kendall", "given": Z}, "partial correlations are not"),
    (X, Y, {"clusters": ["a"]}, "expected 6 labels"),
    (X, list("abcdef"), {}, "y = .*: expected a list of numbers"),
    (X, Y, {"confidence": math.nan}, "confidence = nan: expected a number between 0 and 1"),
  ],
)
def test_what_does_not_correlate_is_refused(x, y, options, message):
  with pytest.raises(config.ConfigError, match=message):
    correlation(x, y, **options)


def test_a_single_cluster_says_nothing_of_others():
  found = correlation(X, Y, clusters=["a"] * 6)
  assert np.isfinite(found.value) and np.isnan([*found.interval, found.p]).all()
  assert "single cluster" in found.p_from


# {n: shares of 500 draws, as `correlation` says}: by percentile and by bca.
COVERAGE = {
  6: {"pearson": (0.880, 0.936), "spearman": (0.942, 0.938)},
  12: {"pearson": (0.918, 0.938), "spearman": (0.990, 0.958)},
  24: {"pearson": (0.908, 0.924), "spearman": (0.962, 0.936)},
}


@pytest.mark.slow
def test_coverage_of_the_intervals():
  """The shares in the docstring of `correlation`, for six normal pairs with a correlation of .8,
  whose Spearman coefficient is 6 / pi asin(.4). With fewer draws, bounds are the binomial's that
  chance exceeds once in 200 on either side."""
  truths = {"pearson": 0.8, "spearman": 6 / math.pi * math.asin(0.4)}
  draws = int(os.environ.get("DRAWS", 100))
  for n, documented in COVERAGE.items():
    hits = {(method, interval): 0 for method in truths for interval in ("percentile", "bca")}
    for draw in range(draws):
      x, noise = np.random.default_rng(draw).normal(size=(2, n))
      y = 0.8 * x + 0.6 * noise
      for method, interval in hits:
        low, high = bootstrap_interval(
          CORRELATIONS[method].statistic, [x, y], interval=interval, resamples=999
        )
        hits[method, interval] += low <= truths[method] <= high
    print(n, {key: hit / draws for key, hit in hits.items()})
    expected = [share for shares in documented.values() for share in shares]
    for (key, hit), share in zip(hits.items(), expected, strict=True):
      least, most = stats.binom.ppf([0.005, 0.995], draws, share)
      assert least <= hit <= most, (n, key, hit / draws, share)
