"""What quantization costs at the common loss, by the way there: planted costs are recovered, as is
whether the order of optimizers depends on the way."""

import math

import numpy as np
import pytest
from workdirs import cell, workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis.landings import WAYS, compare_landings
from configs import adamw, muon, soap

LONG = dict(argument=",steps=256", checkpoints=(128, 192, 224, 256))


def curve(end):
  return {64: end + 2.25, 128: end + 1.25, 256: end}


def cost(run, step, lost, recipe="rtn_w4a4", method="rtn", **settings):
  metrics = {"loss": 4.0 + lost, "loss_difference": lost, "agreement": 1 - lost}
  cell(run, step, recipe, method, metrics, **settings)


@pytest.fixture
def landed(tmp_path):
  """AdamW ends at a loss of 4. Muon and SOAP end lower: step 192 is nearest to 4, 224 the first
  below. Muon loses least when re-run, and most at its first crossing."""
  for seed in (0, 1, 2):
    off = 0.01 * seed
    cost(workdir(tmp_path, adamw, 0.1, seed, curve(4.0), **LONG), 256, 0.3 + off)
    for module, costs in ((muon, (0.1, 0.2, 0.5)), (soap, (0.15, 0.1, 0.2))):
      run = workdir(tmp_path, module, 0.1, seed, curve(3.5), **LONG)
      again = workdir(tmp_path / "again", module, 0.1, seed, {160: 4.02}, argument=",steps=160")
      for (where, step), lost in zip(((again, 160), (run, 192), (run, 224)), costs, strict=True):
        cost(where, step, lost + off * {160: 1, 192: 1.5, 224: 2.5}[step])
  return tmp_path


def test_each_landing_has_its_cost_and_its_place_in_the_schedule(landed):
  found = compare_landings(runs.find(landed))
  assert found.loss == 4.0 and found.missing == [] and len(found.values) == 3 * 9
  means = found.means.set_index(["optimizer", "way"])
  for way, step, value, off in (
    ("re-run", 160, 0.11, 0.02),
    ("nearest", 192, 0.215, 0.125),
    ("crossing", 224, 0.525, -0.1875),
  ):
    row = means.loc["muon", way]
    assert (row.step, row.seeds) == (step, 3)
    assert row.value == pytest.approx(value) and row.off == pytest.approx(off)
  assert means.loc["muon", "re-run"].fraction == 1
  assert means.loc["muon", "re-run"].rate == pytest.approx(1 / 32), "of a cool-down of 32 steps"
  assert means.loc["muon", "nearest"].fraction == 0.75 and means.loc["muon", "nearest"].rate == 1
  assert means.loc["muon", "crossing"].rate == pytest.approx(33 / 51)
  assert [means.loc["adamw", way].step for way in WAYS] == [256] * 3, "which CL is of"
  assert found.values.full_precision_loss.to_numpy() == pytest.approx(4.0)


def test_differences_are_paired_by_seed(landed):
  found = compare_landings(runs.find(landed)).differences
  row = found.set_index(["optimizer", "way", "other"]).loc["muon", "nearest", "crossing"]
  off = np.array([0, 0.01, 0.02])
  assert row.value == pytest.approx((0.3 + off).mean()) and row.seeds == 3
  assert row.value_stderr == pytest.approx(off.std(ddof=1) / math.sqrt(3)) and row.p < 0.01
  row = found.set_index(["optimizer", "way", "other"]).loc["muon", "re-run", "nearest"]
  assert row.value == pytest.approx(0.105)
  assert row.value_stderr == pytest.approx(off.std(ddof=1) / 2 / math.sqrt(3))


def test_whether_the_order_of_optimizers_is_that_of_the_way(landed):
  found = compare_landings(runs.find(landed))
  orders = found.orders.set_index(["way", "other"])
  assert orders.loc["re-run", "nearest"].to_dict() == {
    **{"recipe": "rtn_w4a4", "method": "rtn", "optimizers": 3},
    **{"changes": True, "exchanged": "muon, soap"},
  }
  assert orders.loc["nearest", "crossing"].exchanged == "adamw, muon"
  assert orders.loc["re-run", "crossing"].exchanged == "adamw, muon; muon, soap"
  places = found.means.set_index(["way", "optimizer"]).place
  assert [places["re-run", name] for name in ("muon", "soap", "adamw")] == [1, 2, 3]
  # Of a metric that is better the higher, the best is still first.
  agreement = compare_landings(runs.find(landed), "agreement").means.set_index(["way", "optimizer"])
  assert agreement.place["re-run", "muon"] == 1


def test_what_is_missing_is_named_with_what_makes_it(tmp_path):
  for module, end, saved in ((adamw, 4.0, (256,)), (muon, 3.5, (192, 256)), (soap, 3.5, (64,))):
    run = workdir(tmp_path, module, 0.1, 0, curve(end), argument=",steps=256", checkpoints=saved)
    if module is muon:
      cost(run, 192, 0.2, "rtn_w8a8", documents=3)
  found = compare_landings(runs.find(tmp_path))
  assert list(found.means.way) == ["nearest"] and found.orders.empty
  command = (
    f"python -m beyond_outliers.evaluate --workdir={tmp_path}/{{}}/none-0.1-0 --steps={{}} "
    "--recipes=rtn_w8a8 --methods=rtn --documents=3"
  )
  for text in (
    "soap, crossing: no checkpoint at or below the common loss; train with a smaller",
    "soap, re-run: no run of about 181 steps at learning rate 0.1: python -m",
    "muon, seed 0, crossing at step 256: no loss_difference of rtn_w8a8 by rtn: "
    + command.format("muon", 256),
    "adamw, seed 0, re-run at step 256, nearest at step 256, crossing at step 256: no "
    "loss_difference of rtn_w8a8 by rtn: " + command.format("adamw", 256),
  ):
    assert any(line.startswith(text) for line in found.missing), (text, found.missing)
  chosen = compare_landings(runs.find(tmp_path), settings={"documents": "0"})
  assert chosen.values.empty and chosen.means.empty and chosen.differences.empty
  muons = [line for line in chosen.missing if line.startswith("muon, seed 0")]
  assert muons == [
    "muon, seed 0, nearest at step 192, crossing at step 256: no loss_difference of rtn_w4a4 by "
    f"rtn: python -m beyond_outliers.evaluate --workdir={tmp_path}/muon/none-0.1-0 "
    "--steps=192,256 --recipes=rtn_w4a4 --methods=rtn --documents=0"
  ]


def test_metrics_and_cells_that_say_nothing_are_refused(landed):
  with pytest.raises(
    config.ConfigError, match=r"metric = 'agremeent': .* did you mean 'agreement'"
  ):
    compare_landings(runs.find(landed), "agremeent")
  run = runs.open(landed / "muon" / "none-0.1-0").path
  cost(run, 192, 0.3, documents=3)
  with pytest.raises(config.ConfigError, match=r"the cells have documents = \[0, 3\]"):
    compare_landings(runs.find(landed))


def test_a_model_that_broke_at_one_landing_has_no_test(landed):
  run = runs.open(landed / "muon" / "none-0.1-0").path
  cell(run, 192, "rtn_w4a4", "rtn", {"loss": None, "loss_difference": None})
  found = compare_landings(runs.find(landed))
  row = found.differences.set_index(["optimizer", "way", "other"]).loc["muon", "re-run", "nearest"]
  assert row.value == math.inf and math.isnan(row.p)
  places = found.means.set_index(["way", "optimizer"]).place
  assert places["nearest", "muon"] == 3, "the last"
