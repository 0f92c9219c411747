"""Predictors and what was lost, from cells of evaluation jobs: planted numbers are recovered, and
missing ones have a reason."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from workdirs import cell, workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import predictors
from configs import adamw, muon, psgd, scion, shampoo, soap

MODULES = (adamw, muon, psgd, scion, shampoo, soap)
LOST = (0.5, 0.9, 0.2, 0.4, 0.1, 0.7)
R_L = (0.30, 0.52, 0.16, 0.21, 0.11, 0.44)  # in the order of LOST
MMR = (9.0, 8.0, 12.0, 7.0, 15.0, 6.5)  # nearly in the reverse order
UNITS = [
  {"name": "layers/0/mlp/up", "kind": "mlp/up", "R": 0.1, "gain": None},
  {"name": "final_norm", "kind": "final_norm", "R": 0.2, "gain": 0.9},
]


def measured(root, seeds=(0,), optimizers=6, **settings):
  """Runs with cells whose numbers are the planted ones, moved a little by the seed."""
  for number, module in enumerate(MODULES[:optimizers]):
    for seed in seeds:
      run = workdir(root, module, 0.1, seed, {260: 4.0})
      full, off = 4.0 + 0.01 * number, 0.001 * (seed - 1)
      outliers = {"outliers/max_to_median/linear": MMR[number] + off, "outliers/kurtosis/linear": 2}
      cell(run, 260, metrics={"loss": full, **outliers}, **settings)
      lost = LOST[number] + off
      metrics = {
        "loss": full + lost,
        "loss_difference": lost,
        "loss_difference_interval": [0.0, 1.0],
        "agreement": 0.5,
      }
      cell(run, 260, "rtn_w4a4", "rtn", metrics, R_L=R_L[number], units=UNITS, **settings)
  return runs.find(root)


def test_a_row_has_what_was_lost_and_what_might_have_told(tmp_path):
  table = predictors.frame(measured(tmp_path, seeds=(0, 1)))
  assert list(table) == [
    *predictors.KEYS,
    *("loss", "loss_difference", "agreement", "relative", "full_precision_loss"),
    *("max_to_median/linear", "kurtosis/linear", "R_L", "R_L_stderr", "R_L_logits"),
  ]
  assert len(table) == 12 and table.attrs["left_out"] == []
  row = table[(table.optimizer == "muon") & (table.seed == 1)].iloc[0]
  assert row.full_precision_loss == 4.01 and row.R_L == 0.52
  assert row.relative == pytest.approx(0.9 / 4.01) and row["max_to_median/linear"] == 8.0


def test_correlations_are_those_of_the_planted_numbers(tmp_path):
  table = predictors.frame(measured(tmp_path, seeds=(0, 1, 2)))
  found = predictors.correlations(table).set_index("predictor")
  assert list(found.index) == ["max_to_median/linear", "kurtosis/linear", *predictors.ERRORS]
  r_l = found.loc["R_L"]
  assert (r_l.optimizers, r_l.runs, r_l.reason) == (6, 18, "")
  assert r_l.pearson == pytest.approx(stats.pearsonr(R_L, LOST).statistic)
  assert r_l.pearson_low < r_l.pearson < r_l.pearson_high
  assert r_l.spearman == 1.0 and r_l.spearman_p == pytest.approx(2 / 720), "of all pairings"
  assert r_l.kendall == 1.0 and r_l.kendall_p == pytest.approx(2 / 720)
  # Three seeds of an optimizer don't count as three optimizers: p is over clusters.
  assert r_l.runs_pearson == pytest.approx(r_l.pearson, abs=1e-3)
  assert r_l.runs_pearson_p == pytest.approx(r_l.pearson_p, abs=0.01)
  assert r_l.runs_pearson_high - r_l.runs_pearson_low > 0.5 * (r_l.pearson_high - r_l.pearson_low)
  x, y, given = np.array(R_L), np.array(LOST), 4.0 + 0.01 * np.arange(6)
  partial = stats.pearsonr(*(v - np.polyval(np.polyfit(given, v, 1), given) for v in (x, y)))
  assert r_l.partial_pearson == pytest.approx(partial.statistic)
  mmr = found.loc["max_to_median/linear"]
  assert mmr.spearman == pytest.approx(stats.spearmanr(MMR, LOST).statistic)


def test_what_has_no_correlation_has_a_reason(tmp_path):
  found = predictors.correlations(predictors.frame(measured(tmp_path))).set_index("predictor")
  constant, absent = found.loc["kurtosis/linear"], found.loc["inherited"]
  assert math.isnan(constant.pearson) and constant.reason == "kurtosis/linear is 2 for all"
  assert math.isnan(absent.spearman) and absent.reason == "no cell has inherited"
  r_l = found.loc["R_L"]
  assert math.isnan(r_l.runs_pearson) and r_l.reason == "runs_: one seed of each optimizer"
  typo = predictors.correlations(predictors.frame(runs.find(tmp_path)), predictors=["R_1"])
  assert list(typo.reason) == ["no cell has R_1"]


def test_rows_that_lack_a_predictor_or_broke_are_named(tmp_path):
  table = predictors.frame(measured(tmp_path))
  table.loc[table.optimizer == "soap", "R_L"] = np.nan
  table.loc[table.optimizer == "psgd", "max_to_median/linear"] = np.inf
  found = predictors.correlations(table).set_index("predictor")
  assert found.loc["R_L"].optimizers == 5 and found.loc["R_L"].spearman == pytest.approx(1)
  assert "without soap, seed 0, which lacks it" in found.loc["R_L"].reason
  mmr = found.loc["max_to_median/linear"]
  assert math.isnan(mmr.spearman) and mmr.reason == "max_to_median/linear is not finite for psgd"
  with pytest.raises(config.ConfigError, match=r"lost = 'kl': expected one of .*agreement"):
    predictors.correlations(table, "kl")


def test_few_optimizers_have_no_correlation(tmp_path):
  table = predictors.frame(measured(tmp_path, optimizers=3))
  (found,) = predictors.correlations(table, predictors=["R_L"]).itertuples()
  assert found.spearman == 1 and math.isnan(found.partial_pearson)
  assert "partial_: 3 optimizers; at least 4 are needed" in found.reason
  two = predictors.correlations(table[table.optimizer != "muon"], predictors=["R_L"]).iloc[0]
  assert math.isnan(two.spearman) and two.reason == "2 optimizers; at least 3 are needed"


def test_seeds_that_some_lack_leave_p_of_clusters_open(tmp_path):
  found = measured(tmp_path, seeds=(0, 1))
  table = predictors.frame([run for run in found if not str(run.path).endswith("soap/none-0.1-1")])
  (row,) = predictors.correlations(table, predictors=["R_L"]).itertuples()
  assert row.runs == 11 and math.isfinite(row.runs_pearson) and math.isnan(row.runs_pearson_p)
  assert "runs_p: none: clusters are not of one size" in row.reason


def test_units_are_the_rows_of_every_cell(tmp_path):
  table = predictors.units(measured(tmp_path, optimizers=2))
  assert list(table) == [*predictors.KEYS, "name", "kind", "R", "gain"]
  assert list(table.optimizer) == ["adamw"] * 2 + ["muon"] * 2
  assert list(table.name) == ["layers/0/mlp/up", "final_norm"] * 2
  assert math.isnan(table.gain[0]) and table.gain[1] == 0.9 and table.gain.dtype == float


@pytest.mark.parametrize("ask", [predictors.frame, predictors.units])
def test_runs_without_such_cells_are_told_the_command(ask, tmp_path):
  run = workdir(tmp_path, adamw, 0.1, 0, {260: 4.0})
  command = rf"python -m beyond_outliers.evaluate --workdir={run} --recipes=rtn_w4a4 --propagation"
  with pytest.raises(config.ConfigError, match=f"none of 1 has a quantized cell .*: {command}$"):
    ask(runs.find(tmp_path))
  cell(run, 260)  # as it was trained, alone
  with pytest.raises(config.ConfigError, match=f"none of 1 has a quantized cell .*: {command}$"):
    ask(runs.find(tmp_path))
  cell(run, 260, "rtn_w4a4", "rtn", {"loss": 4.5, "loss_difference": 0.5}, R_L=0.1, units=UNITS)
  with pytest.raises(
    config.ConfigError, match=r"under the settings {'documents': '3'}.*--documents=3 --propagation$"
  ):
    ask(runs.find(tmp_path), {"documents": "3"})
  assert len(ask(runs.find(tmp_path))) in (1, 2)


def test_runs_that_were_trained_quantized_have_nothing_to_predict(tmp_path):
  run = workdir(tmp_path, adamw, 0.1, 0, {260: 4.0}, recipe="quest_w4a4")
  cell(run, 260, "quest_w4a4", metrics={"loss": 4.1, "loss_difference": 0.1}, R_L=0.1, units=UNITS)
  with pytest.raises(config.ConfigError, match=r"none of 1 has .* --workdir=RUN --recipes=rtn"):
    predictors.frame(runs.find(tmp_path))
  assert list(predictors.units(runs.find(tmp_path)).recipe) == ["quest_w4a4"] * 2


def test_a_folder_of_cells_that_is_none_is_refused(tmp_path):
  found = measured(tmp_path, optimizers=1)
  with pytest.raises(config.ConfigError, match=rf"folders = '{tmp_path}/no': there is no such"):
    predictors.frame(found, folders=[tmp_path / "no"])


def test_runs_that_were_not_measured_are_left_out_by_name(tmp_path):
  measured(tmp_path, optimizers=2)
  bare = workdir(tmp_path, soap, 0.1, 0, {260: 4.0})
  workdir(tmp_path, soap, 0.1, 0, {260: 4.0}, recipe="quest_w4a4")  # nothing to quantize after it
  early = workdir(tmp_path, psgd, 0.1, 0, {260: 4.0}, status="preempted")
  cell(early, 208, "rtn_w4a4", "rtn", {"loss": 4.5, "loss_difference": 0.5}, R_L=0.1, units=UNITS)
  left_out = [
    f"{run}: none of the cells of its last step, 260, has what this needs" for run in (early, bare)
  ]
  assert predictors.frame(runs.find(tmp_path)).attrs["left_out"] == left_out
  assert predictors.units(runs.find(tmp_path)).attrs["left_out"] == left_out


@pytest.mark.parametrize(
  "options,message",
  [
    ({"documents": 3}, r"all: the cells have documents = \[0, 3\]"),
    ({"data": "other"}, r"all: the cells have data = \['abc', 'other'\]"),
    ({"tokenizer": "other"}, r"all: the cells have tokenizer = \['other', 'words'\]"),
  ],
)
@pytest.mark.parametrize("ask", [predictors.frame, predictors.units])
def test_cells_that_do_not_compare_are_refused(ask, options, message, tmp_path):
  measured(tmp_path / "one", optimizers=1)
  measured(tmp_path / "two", seeds=(1,), optimizers=1, **options)
  with pytest.raises(config.ConfigError, match=message):
    ask(runs.find(tmp_path))


def test_cells_of_averaged_weights_can_be_chosen(tmp_path):
  found = measured(tmp_path, optimizers=1)
  run = found[0].path
  metrics = {"loss": 4.2, "loss_difference": 0.3}
  cell(run, 260, metrics={"loss": 3.9}, average="ema")
  cell(run, 260, "rtn_w4a4", "rtn", metrics, average="ema")
  raw, averaged = (predictors.frame(found, {"average": name}).iloc[0] for name in ("", "ema"))
  assert (raw.average, raw.loss_difference, raw.full_precision_loss) == ("", 0.499, 4.0)
  assert (averaged.average, averaged.loss_difference, averaged.full_precision_loss) == (
    "ema",
    0.3,
    3.9,
  )


def test_a_cell_that_lies_in_two_folders_is_one(tmp_path):
  found = measured(tmp_path, optimizers=1)
  folder = found[0].path / "eval"
  assert len(predictors.frame(found, folders=[folder])) == 1


def test_the_loss_in_full_precision_is_that_of_the_difference_without_its_cell(tmp_path):
  run = workdir(tmp_path, adamw, 0.1, 0, {260: 4.0})
  cell(run, 260, "rtn_w4a4", "rtn", {"loss": 4.5, "loss_difference": 0.5})
  (row,) = predictors.frame(runs.find(tmp_path)).to_dict("records")
  assert row["full_precision_loss"] == 4.0 and row["relative"] == 0.125
  cell(run, 260, "rtn_w4a4", "gptq", {"loss": None, "loss_difference": None})
  table = predictors.frame(runs.find(tmp_path)).set_index("method")
  assert table.loss_difference["gptq"] == math.inf and pd.isna(table.full_precision_loss["gptq"])
