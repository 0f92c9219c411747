"""Going back to an older checkpoint: what came later is set aside whole, and nothing else moves."""

import json
import pathlib

import pytest

from beyond_outliers import config, runs
from beyond_outliers.train import rewind as rewind_lib
from beyond_outliers.train.rewind import check_step, rewind
from beyond_outliers.workdir import Workdir, write_sums
from configs import adamw


@pytest.fixture
def workdir(tmp_path):
  """A run's folder with checkpoints 4, 8 and 12, rows and results of them; no arrays."""
  made = Workdir(tmp_path / "run")
  made.write("config.json", config.to_dict(config.resolve(adamw.get_config())))
  made.write("manifest.json", {"time": "now"})
  made.set_status("diverged", 14, "why")
  for step in (4, 8, 12):
    folder = made.checkpoints / str(step)
    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "array").write_text(str(step))
    write_sums(folder)
    Workdir(made.path / "eval").write(f"{step}-none-none-abc.json", {})
  rows = [{"step": step, "train/loss": 1 / step} for step in range(1, 15)]
  (made.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return made


def contents(folder):
  files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_came_later_is_set_aside_and_nothing_is_lost(workdir):
  before, said = contents(workdir.path), []
  rewind(workdir, 4, said.append)
  (aside,) = workdir.path.glob("aside-4-*")
  assert "checkpoints [8, 12]" in said[0] and str(aside) in said[0]
  assert runs.open(workdir.path).steps == [4]
  moved = contents(aside)
  kept = {name: text for name, text in contents(workdir.path).items() if "aside" not in name}
  assert [json.loads(line)["step"] for line in moved.pop("metrics.jsonl").splitlines()] == [
    *range(5, 15)
  ]
  assert json.loads(moved["status.json"])["status"] == "diverged"
  assert runs.open(workdir.path).status["status"] == "not started", "or nobody would wait for it"
  assert {name.split("/")[1].partition("-")[0] for name in moved if "/" in name} == {"8", "12"}
  # Rows stay in place, too, until the run that goes on drops them.
  assert kept | moved == before and not kept.keys() & moved.keys()


@pytest.mark.parametrize("step", [5, 16])
def test_a_step_without_a_checkpoint_is_refused(workdir, step):
  before = contents(workdir.path)
  with pytest.raises(config.ConfigError, match=rf"--from_step = {step}: .* \[4, 8, 12\]"):
    check_step(workdir, step)
  assert contents(workdir.path) == before


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(workdir, monkeypatch):
  def fail(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(rewind_lib, "mismatch", fail)
  told = r"--from_step = 8: that checkpoint: .*Permission denied.*; nothing is known to be damaged"
  with pytest.raises(config.ConfigError, match=told):
    check_step(workdir, 8)


def test_a_damaged_checkpoint_and_a_folder_without_a_run_are_refused(workdir, tmp_path):
  (workdir.checkpoints / "8" / "array").write_text("9")
  before = contents(workdir.path)
  with pytest.raises(config.ConfigError, match=r"--from_step = 8: that checkpoint is damaged: arr"):
    check_step(workdir, 8)
  assert contents(workdir.path) == before
  with pytest.raises(config.ConfigError, match=r"--from_step = 8: .* has the checkpoints \[\]"):
    check_step(Workdir(tmp_path / "none"), 8)
