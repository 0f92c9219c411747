"""Results of steps that a run has since repeated with other arrays: none counts for the present
checkpoint, wherever the results lie."""

import json
import shutil
import types

import jax
import pytest

from beyond_outliers import runs, train
from beyond_outliers.analysis import ptq_degradation
from beyond_outliers.evaluate import job as job_lib
from beyond_outliers.evaluate.evaluator import Evaluator
from beyond_outliers.evaluate.plan import plan_cells
from beyond_outliers.evaluate.target import RunCheckpoints

POLL = 0.125


@pytest.fixture(scope="module")
def go_back(tiny_config):
  """go_back(workdir, devices): repeats step 2; on other devices, sums round differently."""
  c = tiny_config(**{"model.blocks": 1, "steps": 2, "checkpoint.every": 1, "eval.every": 2})

  def run(workdir, devices, from_step=1):
    chosen = jax.devices()[:devices]
    train.run(c, workdir, devices=chosen, from_step=from_step, say=lambda text: None)

  return run


@pytest.fixture(scope="module")
def trained(go_back, tmp_path_factory):
  path = tmp_path_factory.mktemp("anew") / "run"
  go_back(path, 1, from_step=None)
  return path


@pytest.fixture
def workdir(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  return tmp_path / "run"


def begin(workdir, out=None, say=print):
  target = RunCheckpoints(workdir)
  evaluator = Evaluator(target, plan_cells(target, ["rtn_w4a4"], ["rtn"]), out, warn=say)
  return job_lib.Job(target, evaluator, job_lib.Progress(), POLL)


def measured(folder, step):
  return {path.name: json.loads(path.read_text()) for path in folder.glob(f"{step}-*.json")}


def digests(folder, step):
  return {cell["parameters"] for cell in measured(folder, step).values()}


def test_a_second_job_measures_anew_what_the_run_has_made_anew(go_back, workdir, tmp_path, capsys):
  out, said = tmp_path / "out", []
  begin(workdir, out).once([1, 2])
  before, of_first, digest = measured(out, 1), measured(out, 2), runs.open(workdir).digest(2)
  assert len(of_first) == 2 and digests(out, 2) == {digest}
  assert digests(out, 1) == {runs.open(workdir).digest(1)} != {digest}

  go_back(workdir, 1)
  begin(workdir, out, said.append).once([1, 2])
  assert measured(out, 2) == of_first and not said, "to the bit the same parameters"

  go_back(workdir, 2)
  again = runs.open(workdir).digest(2)
  assert again != digest
  reported, _ = ptq_degradation.find_cells([runs.open(workdir)], {}, [out], but=["step"])
  assert {cell["step"] for _, cell in reported} == {1}
  assert (
    "of step 2, rtn_w4a4, rtn was measured on other parameters than that" in capsys.readouterr().err
  )
  job = begin(workdir, out, said.append)
  job.once([1, 2])
  assert measured(out, 2).keys() == of_first.keys() and digests(out, 2) == {again}
  assert measured(out, 1) == before and not job.skipped
  assert len(said) == 2 and all(
    "measured on other parameters than step 2 has now" in s for s in said
  )


@pytest.mark.parametrize("where", ["eval", "out"])
def test_a_job_that_follows_measures_anew_what_was_made_anew_between_two_looks(
  go_back, workdir, tmp_path, monkeypatch, where
):
  folder = workdir / "eval" if where == "eval" else tmp_path / "out"
  found, ended = [], []

  def look():
    found.append(digests(folder, 2))
    assert found[-1] == {runs.open(workdir).digest(2)}

  events = iter([look, lambda: go_back(workdir, 2), look, lambda: ended.append(True)])
  clock = types.SimpleNamespace(
    sleep=lambda seconds: seconds == POLL and next(events)(), monotonic=float, perf_counter=float
  )
  monkeypatch.setattr(job_lib, "time", clock)
  job = begin(workdir, folder)
  monkeypatch.setattr(job._target, "ended", lambda: bool(ended))
  job.follow()
  job.check_results([1, 2])
  assert len(found) == 2 and found[0] != found[1]
  assert not job.failed and not job.skipped


def test_a_result_of_before_there_were_digests_counts_as_ever(workdir):
  begin(workdir).once([2])
  for path in (workdir / "eval").glob("2-*.json"):
    cell = json.loads(path.read_text())
    del cell["parameters"], cell["sha256"]
    path.write_text(json.dumps(cell))
  before = measured(workdir / "eval", 2)
  begin(workdir).once([2])
  assert len(before) == 2 and measured(workdir / "eval", 2) == before


def test_a_result_counts_once_its_checkpoint_is_gone(workdir):
  """As others are kept."""
  begin(workdir).once([1])
  shutil.rmtree(workdir / "checkpoints" / "1")
  assert runs.open(workdir).digest(1) == ""
  assert not begin(workdir)._evaluator.missing(1)
