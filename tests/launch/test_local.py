"""A sweep on one machine: which runs it starts, where, and that it goes on where it stopped."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def launch(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "launch.local", *arguments], cwd=ROOT, capture_output=True, text=True
  )


def test_it_lists_the_sweep_of_a_config_file(tmp_path):
  done = tmp_path / "learning_rate=0.003,seed=0"
  done.mkdir()
  (done / "status.json").write_text(json.dumps({"status": "done"}))
  result = launch("--config=configs/soap.py", f"--root={tmp_path}", "--where=seed=0", "--list")
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert (
    len(lines) == 5
    and f"[3/5] {done}: done" in lines
    and sum("not started" in line for line in lines) == 4
  )


def test_a_condition_that_nothing_meets_is_refused(tmp_path):
  result = launch("--config=configs/adamw.py", f"--root={tmp_path}", "--where=seed=99", "--list")
  assert (
    result.returncode != 0
    and "--where=seed=99: no run of configs/adamw.py's sweep has these values" in result.stderr
  )


def test_what_an_analysis_found_replaces_the_sweep_s_values(tmp_path):
  """Rates fall out of the sweep, seeds stay; the file is of one size, and says what it knows of."""
  file = tmp_path / "tuned.json"
  file.write_text(
    json.dumps(
      {"size": "nano", "overrides": {"soap": {"optimizer.learning_rate": 0.01, "steps": 7}}}
    )
  )

  def start(config):
    return launch(f"--config={config}", f"--root={tmp_path}", f"--overrides={file}", "--list")

  lines = start("configs/soap_qat.py").stdout.splitlines()
  assert lines == [
    f"[{i + 1}/3] {tmp_path}/learning_rate=0.01,seed={i},steps=7: not started" for i in range(3)
  ]
  assert (
    "found at size nano, and this is 50m; tune at that size" in start("configs/soap.py:50m").stderr
  )
  assert "nothing about muon; it has soap" in start("configs/muon.py").stderr


@pytest.mark.slow
def test_runs_are_made_once(tiny, tmp_path):
  """The sweep's smallest rate, then the same command again, which starts nothing."""
  only = "--where=seed=0,optimizer.learning_rate=0.0003"
  arguments = (f"--config=configs/adamw.py:{tiny(steps=2)}", f"--root={tmp_path}", only)
  first = launch(*arguments)
  assert first.returncode == 0, first.stderr
  folder = tmp_path / "learning_rate=0.0003,seed=0"
  saved = json.loads((folder / "config.json").read_text())
  assert saved["optimizer"]["learning_rate"] == 0.0003 and saved["steps"] == 2
  before = (folder / "metrics.jsonl").stat().st_mtime_ns
  again = launch(*arguments)
  assert (
    again.stdout.strip() == f"[1/1] {folder}: done"
    and (folder / "metrics.jsonl").stat().st_mtime_ns == before
  )
