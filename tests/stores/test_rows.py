"""Rows of metrics that a store has lost some of: a run that goes on from there on another machine
says so, unless it makes them again anyway."""

import json
import shutil

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import mirror_of

from beyond_outliers import runs, train
from beyond_outliers.errors import WorkdirError
from beyond_outliers.workdir import Workdir


@pytest.fixture(scope="module")
def config(tiny_config):
  return tiny_config(**{"model.blocks": 1, "steps": 4, "checkpoint.every": 2, "eval.every": 4})


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "run"
  train.run(config, path, say=lambda text: None)
  return path


@pytest.fixture
def elsewhere(done, store, tmp_path, said):
  """elsewhere(edit of the rows) -> the folder of another machine, of a run that was killed behind
  step 3, with the store's rows so edited."""
  shutil.copytree(done, tmp_path / "here")
  shutil.rmtree(tmp_path / "here" / "checkpoints" / "4")
  Workdir(tmp_path / "here").set_status("running", 3)
  mirror_of(store, tmp_path / "here", said).push()

  def begin(edit):
    rows = edit(store.read("metrics.jsonl")[0])
    store.write("metrics.jsonl", rows) if rows is not None else store.delete(["metrics.jsonl"])
    mirror_of(store, tmp_path / "there", said)
    return tmp_path / "there"

  return begin


def losses(path):
  return {step: row["train/loss"] for step, row in runs.open(path).metrics().iterrows()}


HARMLESS = {
  "all that are behind the checkpoint": lambda rows: b"\n".join(rows.split(b"\n")[:2]) + b"\n",
  "a part of one behind it": lambda rows: b"\n".join(rows.split(b"\n")[:3])[:-20],
}
TOLD = {
  "the last before the checkpoint": lambda rows: rows.split(b"\n")[0] + b"\n",
  "a part of that": lambda rows: b"\n".join(rows.split(b"\n")[:2])[:-20],
  "all": lambda rows: b"",
}


@pytest.mark.parametrize("lost", HARMLESS)
def test_rows_that_are_made_again_may_be_lost(elsewhere, config, done, lost):
  there = elsewhere(HARMLESS[lost])
  train.run(config, there, say=lambda text: None)
  assert losses(there) == losses(done)


@pytest.mark.parametrize("lost", TOLD)
def test_rows_that_a_checkpoint_knows_are_missed(elsewhere, config, done, lost):
  there = elsewhere(TOLD[lost])
  with pytest.raises(WorkdirError, match="the rows up to step 2 are not those that were written"):
    train.run(config, there, say=lambda text: None)
  shutil.copy(done / "metrics.jsonl", there)  # "restore it from a copy"
  train.run(config, there, say=lambda text: None)
  assert losses(there) == losses(done)


def test_rows_that_are_gone_are_told(elsewhere, config):
  there, said = elsewhere(lambda rows: None), []
  train.run(config, there, say=said.append)
  assert any("metrics.jsonl is gone; its rows will begin after step 2" in text for text in said)
  assert sorted(losses(there)) == [3, 4]


def test_rows_of_a_run_that_has_ended_are_missed_by_whoever_reads_them(done, store, tmp_path, said):
  shutil.copytree(done, tmp_path / "here")
  mirror_of(store, tmp_path / "here", said).push()
  store.write("metrics.jsonl", store.read("metrics.jsonl")[0][:-20])
  mirror_of(store, tmp_path / "there", said)
  assert json.loads((tmp_path / "there" / "status.json").read_text())["status"] == "done"
  with pytest.raises(WorkdirError, match=r"metrics\.jsonl was altered since it was written"):
    runs.open(tmp_path / "there").metrics()
