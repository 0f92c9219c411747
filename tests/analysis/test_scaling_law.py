"""Scaling laws: planted parameters are recovered, intervals cover them, and parameters that the
runs do not determine are reported."""

import math
import os

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from beyond_outliers import config
from beyond_outliers.analysis import scaling_law
from beyond_outliers.analysis.huber_regression import Problem
from beyond_outliers.analysis.law_design import design

SIZES = [49.7e6, 121.8e6, 351.2e6, 502.2e6, 769.3e6, 1489e6]
EMBEDDING = 24.6e6
# How many times AdamW's parameters, and tokens, an optimizer's are worth; and likewise of a recipe.
WORTH = {"adamw": (1.0, 1.0), "muon": (1.15, 1.3), "shampoo": (1.08, 0.9)}
LEFT = {
  ("adamw", "quest_w4a4"): (0.863, 0.95),
  ("muon", "quest_w4a4"): (0.852, 0.9),
  ("shampoo", "quest_w4a4"): (0.879, 1.0),
}
TRUTH = {"A": 400.0, "alpha": 0.34, "B": 900.0, "beta": 0.3, "E": 1.7}


def runs(
  optimizers=("adamw",),
  sizes=SIZES,
  ratios=(20,),
  seeds=3,
  noise=0.0,
  draw=0,
  two_terms=False,
  without=0.0,
  truth=TRUTH,
):
  """Rows of runs that follow the law, in N less `without`; noise: of log losses, normal."""
  rng, rows = np.random.default_rng(draw), []
  A, alpha, B, beta, E = truth.values()
  for name in optimizers:
    for recipe in ("none", "quest_w4a4"):
      worth_N, worth_D = np.multiply(WORTH[name], LEFT.get((name, recipe), (1, 1)))
      for N in sizes:
        for ratio in ratios:
          loss = A / ((N - without) * worth_N) ** alpha + E
          loss += B / (ratio * N * worth_D) ** beta if two_terms else 0
          rows += [
            {
              "optimizer": name,
              "recipe": recipe,
              "parameters": N,
              "embedding": EMBEDDING,
              "tokens": ratio * N,
              "seed": seed,
              "loss": loss * math.exp(noise * rng.standard_normal()),
            }
            for seed in range(seeds)
          ]
  return rows


def truth_of(name, shared, truth=TRUTH):
  """The planted value of a parameter of the fitted law."""
  word, _, pair = name.rstrip(")").partition("(")
  optimizer, _, recipe = pair.partition(", ")
  if word.startswith("rho"):
    left = LEFT.get((optimizer, recipe), (1.0, 1.0))
    relative = np.multiply(left, WORTH[optimizer]) if shared else left
    return relative[int(word == "rho_D")]
  return truth[word] / (WORTH[optimizer][0] ** truth["alpha"] if word == "A" and pair else 1)


def test_derivatives_are_those_of_the_curve():
  for law, theta in (("study", [6, 0.3, 1.7, 0.1]), ("two_term", [6, 0.3, 7, 0.2, 1.7, 0.1, -0.2])):
    cells = pd.DataFrame(runs(seeds=1)).rename(columns={"parameters": "N", "tokens": "D"})
    plan = design(cells, law, ("E", "alpha"), ("adamw", "none"))
    theta = dict(zip(sorted(plan.names, key=str.lower), theta, strict=True))
    at = np.array([theta[name] for name in plan.names])
    values, derivatives = plan.curve(at[None])
    expected = optimize.approx_fprime(at, lambda t, plan=plan: plan.curve(t[None])[0][0], 1e-7)
    assert derivatives[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_the_least_sum_is_scipys(delta):
  """scipy.optimize.least_squares has the same Huber loss."""
  table = pd.DataFrame(runs(noise=0.004)).rename(columns={"parameters": "N", "tokens": "D"})
  plan = design(table, "study", ("E", "alpha"), ("adamw", "none"))
  values = np.log(table.loss.to_numpy())
  lower, upper = plan.bounds(table.loss.min())
  problem = Problem(plan.curve, np.arange(len(table)), lower, upper, delta)
  thetas, sums = problem.solve(values[None], plan.starts(table.loss.to_numpy()))
  ours = thetas[np.argmin(sums)]
  theirs = optimize.least_squares(
    lambda t: plan.curve(t[None])[0][0] - values,
    ours + 0.01,
    lambda t: plan.curve(t[None])[1][0],
    loss="huber",
    f_scale=delta,
    x_scale="jac",
    max_nfev=5000,
    xtol=1e-14,
    ftol=1e-14,
  )
  assert sums.min() == pytest.approx(theirs.cost, rel=1e-6) and sums.min() < theirs.cost * (
    1 + 1e-9
  )
  assert ours == pytest.approx(theirs.x, rel=1e-3)


@pytest.mark.parametrize(
  "law, shared, count",
  [
    ("study", ("E", "alpha"), 8),
    ("study", (), 12),
    ("study", ("E", "alpha", "A"), 8),
    ("two_term", ("E", "alpha"), 15),
  ],
)
def test_planted_parameters_come_back(law, shared, count):
  two = law == "two_term"
  rows = runs(tuple(WORTH), ratios=(10, 20, 80) if two else (20,), two_terms=two, seeds=1)
  found = scaling_law.fit(rows, law=law, shared=shared, resamples=0)
  relative = two or "A" in shared
  expected = {name: truth_of(name, relative) for name in found.params}
  assert len(expected) == count and found.params == pytest.approx(expected, rel=1e-5)
  assert all(found.identified.values()), found.reasons
  assert found.rho["adamw", "none"] in (1.0, (1.0, 1.0))
  left = found.rho["shampoo", "quest_w4a4"]
  own = np.multiply(LEFT["shampoo", "quest_w4a4"], WORTH["shampoo"] if relative else 1)
  assert left == pytest.approx(tuple(own) if two else own[0])


@pytest.mark.parametrize("alpha", [0.12, 0.3, 0.75])
@pytest.mark.parametrize("floor", [0.3, 0.9])
def test_other_laws_come_back_too(alpha, floor):
  """Whatever the exponent, and the share of the loss that no size removes."""
  A = 3 * (1 - floor) * SIZES[2] ** alpha
  truth = {**TRUTH, "A": A, "alpha": alpha, "E": 3 * floor}
  found = scaling_law.fit(runs(seeds=1, truth=truth), resamples=0)
  expected = {name: truth_of(name, False, truth) for name in found.params}
  assert found.params == pytest.approx(expected, rel=1e-3)


def test_without_the_embedding_the_law_is_in_other_parameters():
  found = scaling_law.fit(runs(without=EMBEDDING), embedding=False, resamples=0)
  assert found.params == pytest.approx({name: truth_of(name, False) for name in found.params})
  assert found.predict(1e8) == pytest.approx(400 / 1e8**0.34 + 1.7)
  with pytest.raises(config.ConfigError, match=r"D = .*leave D out"):
    found.predict(1e8, 2e9)


def coverage(draws, *, kinds=("profile", "bootstrap"), resamples=400, fit=None, **of_runs):
  """{(parameter, kind): share of draws in which the interval holds the planted value}."""
  hits, relative = {}, (fit or {}).get("law") == "two_term"
  for draw in range(draws):
    found = scaling_law.fit(runs(draw=draw, **of_runs), resamples=resamples, **(fit or {}))
    for name, intervals in found.intervals.items():
      for kind in kinds:
        low, high = getattr(intervals, kind)
        hits.setdefault((name, kind), []).append(low <= truth_of(name, relative) <= high)
  return {key: float(np.mean(hit)) for key, hit in hits.items()}


FOUR = dict(sizes=[SIZES[i] for i in (0, 1, 3, 5)], noise=0.005)


@pytest.mark.slow
def test_coverage_of_the_intervals():
  """By law_intervals, .93 to .96 over 200 draws. With fewer draws, bounds are those that chance
  exceeds once in 200 on either side if it is .945."""
  draws = int(os.environ.get("DRAWS", 100))
  found = coverage(draws, **FOUR)
  print({f"{name}, {kind}": share for (name, kind), share in found.items()})
  least, most = stats.binom.ppf([0.005, 0.995], draws, 0.945) / draws
  assert len(found) == 8 and all(least <= share <= most for share in found.values()), found


def test_intervals_cover_more_often_than_not():
  found = coverage(8, resamples=60, **FOUR)
  assert len(found) == 8 and np.mean(list(found.values())) >= 0.8, found


def test_intervals_shrink_with_the_noise_and_are_the_same_again():
  wide, narrow, again = (
    scaling_law.fit(runs(noise=noise), resamples=100) for noise in (0.004, 0.001, 0.001)
  )
  for name in wide.params:
    for of_wide, of_narrow in zip(wide.intervals[name], narrow.intervals[name], strict=True):
      assert of_narrow.high - of_narrow.low < of_wide.high - of_wide.low
      assert of_narrow.low < narrow.params[name] < of_narrow.high
  assert narrow.table() == again.table()
  assert wide.between_seeds == pytest.approx(0.004, rel=0.5)


def test_one_run_that_went_wrong_moves_the_law_little():
  rows = runs(noise=0.001)
  straight = scaling_law.fit(rows, resamples=0).params["alpha"]
  rows[-1]["loss"] *= 1.05
  robust, squares = (scaling_law.fit(rows, resamples=0, delta=d).params["alpha"] for d in (1e-3, 1))
  assert abs(robust - straight) < 0.2 * abs(squares - straight)


@pytest.mark.parametrize(
  "options, law, needs",
  [
    ({"sizes": SIZES[:1]}, "study", "1 size (N = 4.97e+07): needs at least 3"),
    ({"sizes": SIZES[:2]}, "study", "2 sizes (N = 4.97e+07, 1.22e+08): needs at least 3"),
    ({"seeds": 2}, "two_term", "D/N = 20 in all runs, so that N and D change together: needs"),
    (
      {"sizes": SIZES[:2], "ratios": (10, 20, 80)},
      "two_term",
      "2 sizes (N = 4.97e+07, 1.22e+08): needs at least 3",
    ),
  ],
  ids=["one size", "two sizes", "one ratio", "two sizes, three ratios"],
)
def test_what_the_runs_sizes_do_not_identify_is_said(options, law, needs):
  rows = runs(noise=0.002, two_terms=law == "two_term", **options)
  found = scaling_law.fit(rows, law=law, resamples=20)
  assert not any(found.identified.values())
  assert all(reason.startswith(needs) for reason in found.reasons.values())
  assert all(math.isnan(intervals.bootstrap.low) for intervals in found.intervals.values())
  assert f"not identified: {', '.join(found.params)}: {needs}" in found.table()


def test_one_ratio_is_one_without_the_embedding_too():
  """Even though the ratio of tokens to the other parameters differs between sizes."""
  rows = runs(two_terms=True, seeds=2, noise=0.002)
  found = scaling_law.fit(rows, law="two_term", embedding=False, resamples=0)
  assert all(reason.startswith("D/N = 20 in all runs") for reason in found.reasons.values())


def test_what_noise_hides_is_said_and_predictions_still_hold():
  """Sizes within a factor of 1.5: any E below the losses fits as well."""
  sizes = [1e8, 1.2e8, 1.5e8]
  found = scaling_law.fit(runs(sizes=sizes, noise=0.005), resamples=0)
  assert not found.identified["E"] and found.intervals["E"].profile.low == 0
  assert "flat profile: all below" in found.reasons["E"]
  assert "needs a wider range than 3 values of N over a factor of 1.5" in found.reasons["E"]
  assert found.predict(1.2e8) == pytest.approx(400 / 1.2e8**0.34 + 1.7, rel=0.01)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_losses_that_do_not_fall_with_the_size_identify_nothing(exponent):
  rows = [{**row, "loss": 3 * (row["parameters"] / 1e8) ** exponent} for row in runs(noise=0.002)]
  found = scaling_law.fit(rows, resamples=0)
  assert not found.identified["alpha"] and not found.identified["E"]


def test_a_recipe_with_one_size_has_its_rho():
  rows = [row for row in runs() if row["recipe"] == "none" or row["parameters"] == SIZES[2]]
  found = scaling_law.fit(rows, resamples=0)
  assert found.identified["rho(adamw, quest_w4a4)"]
  assert found.rho["adamw", "quest_w4a4"] == pytest.approx(0.863)


def test_predictions_follow_the_formula_and_unknown_ones_are_refused():
  found = scaling_law.fit(runs(("adamw", "muon")), resamples=0)
  under = found.predict(np.array([1e8, 1e9]), optimizer="muon", recipe="quest_w4a4")
  assert under == pytest.approx(400 / (np.array([1e8, 1e9]) * 1.15 * 0.852) ** 0.34 + 1.7)
  assert found.predict(1e8, 2e9) == pytest.approx(400 / 1e8**0.34 + 1.7)
  with pytest.raises(config.ConfigError, match=r"D = 1\d+.0: .* holds at 20 tokens per parameter"):
    found.predict(1e8, 1e11)
  with pytest.raises(config.ConfigError, match=r"did you mean .*'muon', 'none'"):
    found.predict(1e8, optimizer="moun")
  for size in (-5, 0, math.nan, [1e8, -1]):
    with pytest.raises(config.ConfigError, match=r"N = .*: expected above zero"):
      found.predict(size)
  rows = runs(ratios=(10, 20, 80), two_terms=True)
  two = scaling_law.fit(rows, law="two_term", resamples=0)
  assert two.predict(1e8, 3e9) == pytest.approx(400 / 1e8**0.34 + 900 / 3e9**0.3 + 1.7)
  with pytest.raises(config.ConfigError, match="needs the number of tokens"):
    two.predict(1e8)
  with pytest.raises(config.ConfigError, match=r"D = -3.0: expected above zero"):
    two.predict(1e8, -3)


def test_a_frame_is_a_list_of_rows_in_any_order():
  rows = runs(noise=0.003)
  found = scaling_law.fit(rows, resamples=0).params
  assert scaling_law.fit(pd.DataFrame(rows), resamples=0).params == found
  assert scaling_law.fit(rows[::-1], resamples=0).params == pytest.approx(found, rel=1e-6)


def test_runs_that_are_left_out_are_named():
  rows = [{**row, "status": "done"} for row in runs(("adamw", "muon"))]
  expected = scaling_law.fit([row for row in rows if row["optimizer"] == "adamw"], resamples=0)
  for i, change in enumerate(
    ({"status": "diverged"}, {"status": "running"}, {"loss": math.inf}, {"loss": None})
  ):
    rows[i] |= change
  rows.append({**rows[5], "seed": 9, "loss": 0.0})
  rows = [row for row in rows if (row["optimizer"], row["recipe"]) != ("muon", "none")]
  found = scaling_law.fit(rows, resamples=0)
  run = "adamw, none, {} parameters, {} tokens, seed {}: {}"
  zero, finite = (
    run.format("1.218e+08", "2.436e+09", 9, "loss = "),
    "is not a finite number above 0",
  )
  assert found.left_out[:2] == [
    run.format("4.97e+07", "9.94e+08", 0, "diverged"),
    run.format("4.97e+07", "9.94e+08", 1, "running"),
  ]
  assert all(text.endswith(finite) for text in found.left_out[2:5])
  assert found.left_out[4].startswith(zero)
  assert found.left_out[5:] == ["muon: no run of recipe 'none', which its rho would be relative to"]
  assert found.params == pytest.approx(expected.params)
  assert "left out:\n" + "\n".join(found.left_out) in found.table()


def test_one_seed_is_resampled_by_residuals_which_the_table_says():
  rows = [row for row in runs(noise=0.003) if row["seed"] == 0 or row["parameters"] < 1e8]
  found = scaling_law.fit(rows, resamples=50)
  assert found.resampling == (
    "seeds, and residuals of the fit where 10 of 12 (optimizer, recipe, N, D) have one seed"
  )
  assert found.resampling in found.table()
  assert found.intervals["alpha"].bootstrap.low < found.params["alpha"]


def changed(**columns):
  return [{**row, **columns} for row in runs()]


@pytest.mark.parametrize(
  "rows, options, message",
  [
    ([], {}, r"points = \[\]: no column 'optimizer'; a run is a row with optimizer, recipe,"),
    (runs(seeds=1)[4:8], {}, r"points = '4 runs': the law has 4 parameters .* at least 5 runs"),
    (runs() + runs()[3:4], {}, r"rows \[3, 36\] are one run, adamw, none, 1.218e\+08 parameters"),
    ([*changed(tokenizer="a"), {**runs()[0], "tokenizer": "b"}], {}, "points: tokenizer = 'a, b'"),
    (
      [*changed(**{"data.fingerprint": "x"})[1:], {**runs()[0], "data.fingerprint": "y"}],
      {},
      "points: data.fingerprint = 'x, y': losses on different data",
    ),
    (changed(parameters=-1.0), {}, r"row 0: parameters = -1.0: expected a number above zero"),
    (changed(seed=None), {}, "row 0: seed is missing"),
    ("runs.csv", {}, "points = 'runs.csv': not a table of runs .*give a pandas.DataFrame"),
    (changed(tokens="many"), {}, "row 0: tokens = 'many': expected a number above zero"),
    (
      changed(loss=math.nan),
      {},
      "none of 36 runs is done and has a loss; the first: .* loss = nan",
    ),
    (changed(embedding=1e12), {"embedding": False}, "row 0: embedding = 1e[+]12 of 4.97e[+]07"),
    (
      [{k: v for k, v in row.items() if k != "embedding"} for row in runs()],
      {"embedding": False},
      "no column 'embedding'",
    ),
    (runs(ratios=(20, 100)), {}, r"tokens per parameter = \[20.0, 100.0\]: .*law=\"two_term\""),
    (runs(), {"reference": ("adam", "none")}, r"reference = .*did you mean .*'adamw', 'none'"),
    (runs(), {"reference": "adamw"}, r"reference = 'adamw': .*\('adamw', 'none'\)"),
    (runs(), {"law": "kaplan"}, "law = 'kaplan': expected one of study, two_term"),
    (runs(), {"shared": ("beta",)}, "shared = 'beta': expected one of A, alpha, E"),
    (runs(), {"shared": ("A",)}, "A has alpha's unit: share alpha too"),
    (runs(), {"law": "two_term", "shared": ()}, "shares all but rho"),
    (runs(), {"delta": 0}, "delta = 0: expected a number above zero"),
    (runs(), {"delta": math.inf}, "delta = inf: expected a number above zero"),
    (
      pd.concat([pd.DataFrame(runs()), pd.DataFrame(runs())[["loss"]]], axis=1),
      {},
      r"points = \['loss'\]: these columns appear twice",
    ),
  ],
)
def test_what_cannot_be_fitted_is_refused(rows, options, message):
  with pytest.raises(config.ConfigError, match=message):
    scaling_law.fit(rows, **options)
