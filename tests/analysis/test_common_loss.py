"""The common loss of optimizers whose curves are known, and the steps that lead to it."""

import pytest
from workdirs import cell, workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import tables
from beyond_outliers.analysis.common_loss import common_loss
from configs import adamw, muon, soap


def curve(end, gain=0.25):
  """Evaluations of a run of 256 steps whose loss falls by one nat per doubling of the steps, and by
  `gain` in its cool-down."""
  return {64: end + gain + 2, 128: end + gain + 1, 256: end}


def test_the_common_loss_and_how_many_steps_lead_to_it(tmp_path):
  full = dict(argument=",steps=256")
  workdir(tmp_path, adamw, 0.1, 0, curve(4.0), **full)
  for seed, off in ((0, 0.1), (1, -0.1)):
    workdir(tmp_path, muon, 0.01, seed, curve(3.0 + off), **full)
  workdir(tmp_path, soap, 0.01, 0, curve(3.5), **full)
  workdir(tmp_path, soap, 0.01, 1, curve(3.5), **full, recipe="quest_w4a4")  # of no concern here
  loss, landings = common_loss(runs.find(tmp_path))
  assert loss == 4.0
  assert [(x.optimizer, x.steps) for x in landings] == [
    ("muon", 128),
    ("soap", 181),
    ("adamw", 256),
  ], "a half, 1/sqrt(2), all"
  muons = landings[0]
  assert (
    muons.ending == pytest.approx((256, 3.0))
    and muons.evaluation == pytest.approx((128, 4.25))
    and muons.checkpoint is None
  )
  assert muons.overrides == {"optimizer.learning_rate": 0.01, "steps": 128}
  assert tables.common_loss_table(landings, loss).splitlines()[2] == (
    "| muon | 0.01 | 3.0000 at 256 | 128 | 3.0000 at 256 | -1.0000 | 4.2500 at 128 | none | none |"
  )

  # It ended lower than expected: the second estimate lies between the two ends that are known.
  for seed in (0, 1):
    workdir(tmp_path / "again", muon, 0.01, seed, {128: 3.6}, argument=",steps=128")
  muons = common_loss(runs.find(tmp_path))[1][0]
  assert muons.ending == pytest.approx((128, 3.6))
  assert muons.steps == 81, "128 · 2 ** (-0.4 / 0.6)"


def test_a_checkpoint_between_evaluations_has_a_loss_between_theirs(tmp_path):
  for module, end in ((adamw, 4.0), (muon, 3.0)):
    workdir(tmp_path, module, 0.1, 0, curve(end), argument=",steps=256", checkpoints=(96, 256))
  muons, adamws = common_loss(runs.find(tmp_path))[1]
  assert muons.checkpoint == pytest.approx((96, 4.75)) and adamws.checkpoint == pytest.approx(
    (256, 4.0)
  )


def test_a_checkpoint_before_the_first_evaluation_has_no_loss(tmp_path):
  """As configs/ make one, at a quarter of the run, with evaluations at thirds."""
  workdir(tmp_path, adamw, 0.1, 0, curve(4.0), argument=",steps=256", checkpoints=(256,))
  falls = {64: 3.9, 128: 3.5, 256: 3.0}
  workdir(tmp_path, muon, 0.1, 0, falls, argument=",steps=256", checkpoints=(32, 96, 256))
  muons, _ = common_loss(runs.find(tmp_path))[1]
  assert muons.crossing == pytest.approx((96, 3.7)), "32 may well be above 4.0"
  assert muons.checkpoint == pytest.approx((96, 3.7))


def test_a_checkpoint_that_was_evaluated_counts_though_it_is_gone(tmp_path):
  """As in packed runs, since its cells say what it costs; but not one of another training."""
  workdir(tmp_path, adamw, 0.1, 0, curve(4.0), argument=",steps=256", checkpoints=(256,))
  run = workdir(tmp_path, muon, 0.1, 0, curve(3.0), argument=",steps=256")
  cell(run, 128)
  cell(run, 160, trained="another")
  muons, _ = common_loss(runs.find(tmp_path))[1]
  assert muons.checkpoint == pytest.approx((128, 4.25)) and muons.crossing is None


def test_the_first_checkpoint_below_the_common_loss(tmp_path):
  """It must exist for all seeds; its loss is an estimate. The worst optimizer's is its last."""
  for seed in range(3):
    # Losses whose mean depends on the order of the sum.
    workdir(
      tmp_path, adamw, 0.1, seed, curve(4.0 + 0.1 * seed), argument=",steps=256", checkpoints=(256,)
    )
  for seed, saved in ((0, (64, 128, 192, 224, 256)), (1, (192, 224, 256))):
    workdir(tmp_path, muon, 0.1, seed, curve(3.5), argument=",steps=256", checkpoints=saved)
  workdir(tmp_path, soap, 0.1, 0, curve(3.9), argument=",steps=256", checkpoints=(128,))
  loss, (muons, soaps, adamws) = common_loss(runs.find(tmp_path))
  assert loss == pytest.approx(4.1)
  assert muons.crossing == pytest.approx((224, 3.8125)), "4.125 at 192 is above"
  assert muons.checkpoint == pytest.approx((192, 4.125)), "which is nearer"
  assert adamws.crossing == pytest.approx((256, 4.1))
  assert soaps.crossing is None, "5.15 at the only checkpoint"
  assert [run.config.seed for run in muons.runs] == [0, 1]


def test_a_run_that_tells_too_little_for_the_common_loss_is_refused(tmp_path):
  workdir(tmp_path, adamw, 0.1, 0, curve(4.0), argument=",steps=256")
  workdir(tmp_path, muon, 0.1, 0, {128: 4.0, 256: 3.5}, argument=",steps=256")
  with pytest.raises(
    config.ConfigError, match=r"muon: 1 evaluations between .* train with a smaller eval.every"
  ):
    common_loss(runs.find(tmp_path))
  workdir(tmp_path, soap, 0.1, 0, {128: 4.0}, argument=",steps=128")
  with pytest.raises(config.ConfigError, match="soap: no run of 256 steps, the longest here"):
    common_loss(runs.find(tmp_path))
