"""What a recipe costs, from workdirs: paired by seed, at the rate of full precision, with nothing
dropped silently."""

import math

import numpy as np
import pytest
from scipy import stats
from workdirs import workdir

from beyond_outliers import runs
from beyond_outliers.analysis import plots, qat_gap, tables
from configs import adamw, muon, soap

PLAIN = np.array([4.0, 4.4, 4.1])  # by seed
COST = np.array([0.30, 0.34, 0.26])  # varies much less than the seeds do


@pytest.fixture
def pairs(tmp_path):
  for seed in range(3):
    workdir(tmp_path, adamw, 0.1, seed, {260: PLAIN[seed]})
    workdir(tmp_path, adamw, 0.1, seed, {260: PLAIN[seed] + COST[seed]}, recipe="quest_w4a4")
    workdir(tmp_path, muon, 0.01, seed, {260: PLAIN[seed] - 0.5})
    workdir(tmp_path, muon, 0.01, seed, {260: PLAIN[seed] - 0.5 + 0.1}, recipe="quest_w4a4")
  return tmp_path


def test_the_standard_error_is_of_paired_differences(pairs):
  (muons, adamws), left_out = qat_gap.qat_gaps(runs.find(pairs))
  assert (muons.optimizer, adamws.optimizer, left_out) == ("muon", "adamw", []), (
    "the smallest first"
  )
  assert adamws.loss == pytest.approx((COST.mean(), COST.std(ddof=1) / math.sqrt(3)))
  assert adamws.bits == pytest.approx((COST.mean() / 2, COST.std(ddof=1) / math.sqrt(3) / 2))
  assert adamws.percent.mean == pytest.approx(100 * (COST / PLAIN).mean())
  assert tables.qat_gap_table([adamws]).splitlines()[2] == (
    "| adamw | quest_w4a4 | 0.1 | 4.1667 ± 0.1202 | 4.4667 ± 0.1378 | +0.3000 ± 0.0231 | +0.1500 ± "
    "0.0115 | +7.19 ± 0.43 | 3 |"
  )


def test_only_pairs_count_and_the_rest_is_named(pairs):
  workdir(pairs, adamw, 0.1, 2, {260: 9.0}, recipe="quest_w4a4", status="diverged")
  workdir(pairs, muon, 0.01, 7, {260: 9.0}, recipe="quest_w4a4")
  workdir(pairs, soap, 0.01, 0, {260: 3.0})
  found, left_out = qat_gap.qat_gaps(runs.find(pairs))
  muons, adamws = found
  assert muons.seeds == (0, 1, 2) and muons.loss.mean == pytest.approx(0.1)
  assert adamws.seeds == (0, 1) and adamws.loss.mean == pytest.approx(0.32)
  assert left_out == [
    f"{pairs}/adamw/quest_w4a4-0.1-2: diverged at step 260 of 260",
    "soap: no run under a recipe",
    "adamw, quest_w4a4: seeds [2] are done on one side only, at learning rate 0.1",
    "muon, quest_w4a4: seeds [7] are done on one side only, at learning rate 0.01",
  ]


def test_both_sides_have_the_rate_of_full_precision(pairs):
  """Even if another rate is better under the recipe. If it was not tried there, the best one that
  was is used, and the table says so."""
  for seed in range(3):
    workdir(pairs, adamw, 0.3, seed, {260: 4.9})
    workdir(pairs, adamw, 0.3, seed, {260: 4.3}, recipe="quest_w4a4")
    workdir(pairs, soap, 0.01, seed, {260: 3.0})
    workdir(pairs, soap, 0.03, seed, {260: 3.5}, recipe="quest_w4a4")
  found = {gap.optimizer: gap for gap in qat_gap.qat_gaps(runs.find(pairs))[0]}
  assert found["adamw"].rates == (0.1, 0.1) and found["adamw"].loss.mean == pytest.approx(0.3)
  assert found["soap"].rates == (0.01, 0.03)
  assert "| soap | quest_w4a4 | 0.01, then 0.03 |" in tables.qat_gap_table(list(found.values()))
  own = {
    gap.optimizer: gap for gap in qat_gap.gaps_at_own_rates(runs.find(pairs), [*found.values()])
  }
  assert own["adamw"].rates == (0.1, 0.3)
  assert own["adamw"].loss.mean == pytest.approx(4.3 - PLAIN.mean())
  assert own["soap"].rates == found["soap"].rates
  assert qat_gap.gaps_at_own_rates(runs.find(pairs), [*own.values()]) == []


def test_gaps_are_told_from_none_and_from_each_other_by_seeds_they_share(pairs):
  """p of the paired t test with Holm's correction, over two gaps, and separately over one pair."""
  for seed in (0, 1):
    workdir(pairs, soap, 0.01, seed, {260: PLAIN[seed] - 0.4})
    cost = (0.33, 0.29)[seed]
    workdir(pairs, soap, 0.01, seed, {260: PLAIN[seed] - 0.4 + cost}, recipe="quest_w4a4")
  compared = qat_gap.compare_gaps(qat_gap.qat_gaps(runs.find(pairs))[0])
  assert {recipe for recipe, _ in compared} == {"quest_w4a4"}
  by_name = {one.name: one for _, one in compared}
  names = ["muon", "adamw", "soap", "adamw - muon", "soap - muon", "soap - adamw"]
  assert list(by_name) == names, "smallest p first"
  p = stats.ttest_1samp(COST, 0).pvalue
  assert by_name["adamw"].p == pytest.approx(2 * p) and by_name["adamw"].n == 3
  assert by_name["adamw"].value == pytest.approx(0.3) and not by_name["adamw"].tie
  assert by_name["adamw - muon"].value == pytest.approx(0.2)
  assert by_name["adamw - muon"].p == pytest.approx(3 * stats.ttest_1samp(COST - 0.1, 0).pvalue)
  assert by_name["soap - adamw"].n == 2, "the seeds that both have"
  assert by_name["soap - adamw"].value == pytest.approx(np.mean([0.33, 0.29] - COST[:2]))
  assert by_name["soap - adamw"].tie
  table = tables.gap_comparison_table(compared).splitlines()
  assert table[3].startswith("| quest_w4a4 | adamw | +0.3000 | +0.") and table[3].endswith(
    "| yes |"
  )


def test_one_seed_has_no_standard_error_and_recipes_stay_apart(tmp_path):
  workdir(tmp_path, adamw, 0.1, 0, {260: 4.0})
  workdir(tmp_path, adamw, 0.1, 0, {260: 4.1}, recipe="rtn_w8a8")
  workdir(tmp_path, adamw, 0.1, 0, {260: 4.5}, recipe="quest_w4a4")
  found, _ = qat_gap.qat_gaps(runs.find(tmp_path))
  assert qat_gap.compare_gaps(found) == []
  assert [(gap.recipe, round(gap.loss.mean, 6)) for gap in found] == [
    ("quest_w4a4", 0.5),
    ("rtn_w8a8", 0.1),
  ]
  assert (
    tables.qat_gap_table(found).splitlines()[2]
    == "| adamw | quest_w4a4 | 0.1 | 4.0000 | 4.5000 | +0.5000 | +0.2500 | +12.50 | 1 |"
  )


def test_the_figure_is_written(pairs, tmp_path):
  plots.plot_qat_gaps(qat_gap.qat_gaps(runs.find(pairs))[0], tmp_path / "gap.png")
  assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
