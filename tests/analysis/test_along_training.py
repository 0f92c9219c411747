"""What quantization costs along a run: where checkpoints stand in its schedule, and how much delta
jumps in the cool-down."""

import math

import numpy as np
import pytest
from workdirs import cell, workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import along_training
from configs import adamw, muon

STEPS = (5, 20, 40, 60, 80, 90, 100)  # in warm-up, four at the peak, two in the cool-down
DELTA = (0.5, 0.10, 0.11, 0.10, 0.13, 0.20, 0.30)


def trained(root, module=adamw, seed=0, off=0.0, steps=STEPS, **settings):
  """A run of 100 steps whose cells have the planted delta, plus `off` at the end."""
  run = workdir(root, module, 0.1, seed, {100: 4.0}, argument=",steps=100,schedule.warmup=0.1")
  for step, delta in zip(STEPS, DELTA, strict=True):
    if step in steps:
      full, share = 5.0 - 0.01 * step, delta + (off if step == 100 else 0)
      cell(run, step, metrics={"loss": full}, **settings)
      metrics = {"loss": full * (1 + share), "loss_difference": full * share}
      cell(run, step, "rtn_w4a4", "rtn", metrics, **settings)
  return run


def test_every_checkpoint_stands_in_the_schedule_of_its_run(tmp_path):
  trained(tmp_path)
  table = along_training.frame(runs.find(tmp_path))
  assert tuple(table) == along_training.COLUMNS
  assert list(table.step) == list(STEPS) and list(table.fraction) == [s / 100 for s in STEPS]
  assert table.delta.to_numpy() == pytest.approx(DELTA)
  assert table.loss.to_numpy() == pytest.approx([5 - 0.01 * s for s in STEPS])
  # The rate is of the step that led to the checkpoint: 90 is the eleventh of twenty from 1 to 1/20.
  assert table.rate.to_numpy() == pytest.approx([0.001 + 0.999 * 0.4, 1, 1, 1, 1, 0.55, 0.05])


def test_the_rate_is_that_which_training_logs(tmp_path):
  """At step 10 of 260 with a warm-up of 13: 0.0692615 of a peak of 0.1."""
  run = runs.open(workdir(tmp_path, adamw, 0.1, 0, {260: 4.0}))
  fraction, rate = along_training.schedule_position(run.config, 10)
  assert fraction == 10 / 260 and rate == pytest.approx(0.06926154345 / 0.1, rel=1e-6)


def test_the_jump_in_the_cool_down_is_paired_by_seed(tmp_path):
  for seed, off in enumerate((0.0, 0.03, 0.06)):
    trained(tmp_path, seed=seed, off=off)
  trained(tmp_path, muon)
  adamws, muons = along_training.jump(along_training.frame(runs.find(tmp_path))).to_dict("records")
  assert (adamws["recipe"], adamws["method"], adamws["optimizer"]) == ("rtn_w4a4", "rtn", "adamw")
  assert adamws["constant"] == pytest.approx(0.11) and adamws["change"] == pytest.approx(0.03)
  assert adamws["constant_stderr"] == pytest.approx(0, abs=1e-12)
  assert adamws["end"] == pytest.approx(0.33) and adamws["jump"] == pytest.approx(0.22)
  assert adamws["jump_stderr"] == pytest.approx(np.std([0, 0.03, 0.06], ddof=1) / math.sqrt(3))
  assert (adamws["seeds"], adamws["checkpoints"], adamws["reason"]) == (3, 4, "")
  assert muons["jump"] == pytest.approx(0.19) and math.isnan(muons["jump_stderr"])


def test_averaged_weights_are_rows_of_their_own(tmp_path):
  trained(tmp_path)
  trained(tmp_path, off=-0.15, steps=(80, 100), average="ema")
  table = along_training.frame(runs.find(tmp_path))
  assert list(table.average) == [""] * 7 + ["ema"] * 2
  raw, averaged = along_training.jump(table).to_dict("records")
  assert raw["jump"] == pytest.approx(0.19) and averaged["average"] == "ema"
  assert averaged["jump"] == pytest.approx(0.15 - 0.13) and math.isnan(averaged["change"])
  assert set(along_training.frame(runs.find(tmp_path), {"average": "ema"}).average) == {"ema"}


def test_a_run_without_both_ends_is_named(tmp_path):
  trained(tmp_path, seed=0)
  early, late = trained(tmp_path, seed=1, steps=STEPS[:5]), trained(tmp_path, seed=2, steps=(100,))
  (row,) = along_training.jump(along_training.frame(runs.find(tmp_path))).to_dict("records")
  assert row["seeds"] == 1 and row["jump"] == pytest.approx(0.19)
  assert row["reason"] == (
    f"{early}: no cell of the last step; {late}: no cell at the peak learning rate"
  )
  (row,) = along_training.jump(along_training.frame([runs.open(late)])).to_dict("records")
  assert row["seeds"] == 0 and math.isnan(row["jump"]) and math.isnan(row["jump_stderr"])


def test_runs_without_cells_are_told_the_command(tmp_path):
  run = workdir(tmp_path, adamw, 0.1, 0, {260: 4.0})
  for _ in range(2):
    with pytest.raises(
      config.ConfigError,
      match=rf"none of 1 has a quantized cell.*--workdir={run} --steps=all --recipes=rtn_w4a4$",
    ):
      along_training.frame(runs.find(tmp_path))
    cell(run, 260)  # as it was trained, alone


def test_cells_that_do_not_compare_are_refused(tmp_path):
  trained(tmp_path / "one")
  trained(tmp_path / "two", documents=3)
  with pytest.raises(config.ConfigError, match=r"all: the cells have documents = \[0, 3\]"):
    along_training.frame(runs.find(tmp_path))
  with pytest.raises(config.ConfigError, match=r"adamw: .*one.* and .*two.* have seed 0"):
    trained(tmp_path / "two")
    along_training.frame(runs.find(tmp_path), {"documents": "0"})
