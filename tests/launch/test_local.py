"""A sweep on one machine: which runs it starts, where, and that it goes on where it stopped."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import commands
import pytest

from beyond_outliers import config
from configs import soap

ROOT = pathlib.Path(__file__).parents[2]


def launch(*arguments):
  return commands.run("launch.local", *arguments)


def test_it_lists_the_sweep_of_a_config_file(tmp_path):
  done = tmp_path / "learning_rate=0.003,seed=0"
  done.mkdir()
  (done / "status.json").write_text(json.dumps({"status": "done"}))
  result = launch("--config=configs/soap.py", f"--root={tmp_path}", "--where=seed=0", "--list")
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert (
    len(lines) == 6
    and f"[2/6] {done}: done" in lines
    and sum("not started" in line for line in lines) == 5
  )


def test_a_run_of_another_configuration_in_the_root_is_refused(tmp_path):
  """Done, it was called so whatever was asked for; one that has to go on failed hours later."""
  folder = tmp_path / "learning_rate=0.003,seed=0"
  folder.mkdir()
  saved = config.to_dict(config.resolve(soap.get_config("nano,optimizer.learning_rate=0.003")))
  (folder / "config.json").write_text(json.dumps(saved))
  (folder / "status.json").write_text(json.dumps({"status": "done"}))

  def start(of):
    return launch(f"--config=configs/{of}", f"--root={tmp_path}", "--where=seed=0", "--list")

  for same in ("soap.py", "soap.py:nano,log.every=3"):
    result = start(same)
    assert result.returncode == 0 and f"{folder}: done" in result.stdout, result.stderr
  others = {
    "soap.py:nano,steps=24": "steps: 260 in the workdir, 24 now",
    "muon.py": "optimizer.name: 'soap' in the workdir, 'muon' now",
  }
  for other, told in others.items():
    result = start(other)
    assert result.returncode == 2 and not result.stdout, result.stderr
    assert f"{folder}: the workdir holds a run of another" in result.stderr, result.stderr
    assert told in result.stderr
  (folder / "config.json").write_text("{")
  assert start("soap.py").returncode == 0, "which the run refuses"


@pytest.mark.parametrize("launcher, look", [("local", "--list"), ("slurm", "--dry_run")])
def test_a_run_under_other_settings_of_jax_in_the_root_is_refused(tmp_path, launcher, look):
  """Done, it was called so, where `main` refuses."""
  folder = tmp_path / "learning_rate=0.003,seed=0"
  folder.mkdir()
  (folder / "status.json").write_text(json.dumps({"status": "done"}))
  (folder / "manifest.json").write_text(json.dumps({"jax": {"jax_enable_x64": True}}))
  given = ("--config=configs/soap.py", f"--root={tmp_path}", "--where=seed=0", look)
  refused = commands.run(f"launch.{launcher}", *given)
  assert refused.returncode == 2 and not refused.stdout, refused.stderr
  told = f"error: {folder}: jax_enable_x64 = False: the run was trained under True (manifest.json)"
  assert refused.stderr.startswith(told) and len(refused.stderr.splitlines()) == 1, refused.stderr
  taken = commands.run(f"launch.{launcher}", *given, JAX_ENABLE_X64="1")
  assert taken.returncode == 0, taken.stderr


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
      {
        "size": "nano",
        "model": {"blocks": 2},
        "overrides": {"soap": {"optimizer.learning_rate": 0.01, "steps": 7}},
      }
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
  assert "found with model.blocks = 2, and this has 1; tune that model" in (
    start("configs/soap.py:nano,model.blocks=1").stderr
  )
  assert "nothing about muon; it has soap" in start("configs/muon.py").stderr


@pytest.mark.slow
def test_runs_are_made_once_evaluated_and_reported(tiny, tmp_path):
  """The sweep's smallest rate, then its training again, which starts nothing."""
  only = "--where=seed=0,optimizer.learning_rate=0.0003"
  arguments = (f"--config=configs/adamw.py:{tiny(steps=2)}", f"--root={tmp_path}", only)
  behind = ("--evaluate=behind", "--evaluate_flags=--documents=2", "--report")
  first = launch(*arguments, "--devices=2", *behind)
  assert first.returncode == 0, first.stderr
  folder = tmp_path / "learning_rate=0.0003,seed=0"
  saved = json.loads((folder / "config.json").read_text())
  assert saved["optimizer"]["learning_rate"] == 0.0003 and saved["steps"] == 2
  assert json.loads((folder / "manifest.json").read_text())["devices"]["count"] == 2
  assert list((folder / "eval").glob("2-none-*.json"))
  assert (tmp_path / "report/report.html").exists()
  before = (folder / "metrics.jsonl").stat().st_mtime_ns
  again = launch(*arguments)
  assert (
    again.stdout.strip() == f"[1/1] {folder}: done"
    and (folder / "metrics.jsonl").stat().st_mtime_ns == before
  )


# what is wrong -> (arguments, what the one line on stderr holds); {folder} holds torn.json
REFUSED = {
  "no sweep": (["--config=configs/base.py"], "--config=configs/base.py: has no sweep"),
  "no file": (["--config=configs/nobody.py"], "--config=configs/nobody.py: there is no such file"),
  "a condition": (["--where=seed"], "--where=seed: expected key=value"),
  "a condition's value": (["--where=seed=zero"], "--where=seed=zero: expected key=value"),
  "a condition twice": (["--where=seed=0,seed=1"], "--where = 'seed': is given twice"),
  "no run": (["--where=seed=99"], "--where=seed=99: no run of"),
  "no overrides": (["--overrides=nobody.json"], "--overrides=nobody.json: there is no such file"),
  "torn overrides": (["--overrides={folder}/torn.json"], "torn.json: is not the JSON that was"),
  "a home that nobody has": (["--root=~nouser/runs"], "--root=~nouser/runs: ~ is not a home"),
  "evaluation of nothing": (
    ["--evaluate_flags=--recipes=rtn_w4a4"],
    "for which job? give --evaluate",
  ),
  "a flag of nobody": (["--evaluate=behind", "--evaluate_flags=--typo=1"], "flag 'typo'"),
  "a recipe": (["--evaluate=beside", "--evaluate_flags=--recipes=typo"], "'typo': unknown recipe"),
  "another run": (["--evaluate=behind", "--evaluate_flags=--workdir=x"], "the launcher gives"),
  "a root twice": (["--root=x", "--root=y"], "--root is given 2 times: give it once"),
  "a flag of evaluations twice": (
    ["--evaluate=behind", "--evaluate_flags=--documents=2 --documents=3"],
    "--evaluate_flags=--documents=2 --documents=3: --documents is given 2 times: give it once",
  ),
}


# Whose names take all of JAX to look up.
SLOW = {"a recipe"}


@pytest.mark.parametrize(
  "what", [pytest.param(w, marks=[pytest.mark.slow] if w in SLOW else []) for w in REFUSED]
)
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, what):
  (tmp_path / "torn.json").write_text('{"size": "na')
  arguments, line = REFUSED[what]
  given = [argument.format(folder=tmp_path) for argument in arguments]
  usual = ["--config=configs/adamw.py", f"--root={tmp_path}", "--list"]
  result = launch(*commands.instead(usual, given))
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
  assert result.stderr.startswith("error: ") and line in result.stderr


def test_a_run_whose_status_cannot_be_read_is_not_in_the_way_of_the_others(tmp_path):
  (tmp_path / "learning_rate=0.003,seed=0").mkdir()
  (tmp_path / "learning_rate=0.003,seed=0" / "status.json").write_text("{")
  result = launch("--config=configs/soap.py", f"--root={tmp_path}", "--where=seed=0", "--list")
  assert result.returncode == 0 and "0.003,seed=0: unreadable" in result.stdout


# Saves when it is asked to, as a run does, and takes its time.
RUN = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
pathlib.Path(sys.argv[1], "started").touch()
while not asked:
  time.sleep(0.01)
time.sleep(1)
pathlib.Path(sys.argv[1], "saved").write_text(str(len(asked)))
sys.exit(42)
"""
LAUNCHER = """
import signal, sys
from launch import jobs, pool
made = [jobs.Job(name, "train", "saving_run", (sys.argv[1],), sys.argv[1]) for name in ("a", "b")]
runner = pool.Pool(made, sys.executable)
pool.catch(runner.hand_on, (signal.SIGINT,))
runner.run()
assert runner.asked and runner.tasks[1].code is None
sys.exit(runner.tasks[0].code)
"""


@pytest.mark.parametrize("group", [True, False], ids=["of a terminal", "to the launcher alone"])
def test_ctrl_c_reaches_a_run_once_and_is_waited_for(tmp_path, group):
  (tmp_path / "saving_run.py").write_text(RUN)
  process = subprocess.Popen(
    [sys.executable, "-c", LAUNCHER, str(tmp_path)],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    start_new_session=True,
  )
  try:
    while not (tmp_path / "started").exists():
      assert process.poll() is None
      time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    assert process.wait(60) == 42
  finally:
    process.kill()
  assert (tmp_path / "saved").read_text() == "1"


def test_a_dry_run_prints_what_a_shell_would_take(tmp_path):
  """Jobs with their commands, processes of a run included."""
  root = tmp_path / "it's $(here)"
  result = launch(
    "--config=configs/soap.py",
    f"--root={root}",
    "--where=seed=0,optimizer.learning_rate=0.003",
    "--evaluate=behind",
    "--report",
    "--processes=2",
    "--dry_run",
  )
  lines = result.stdout.splitlines()
  assert [line for line in lines if line.startswith("[")] == [
    f"[1/3] {root}/learning_rate=0.003,seed=0: not started",
    f"[2/3] {root}/learning_rate=0.003,seed=0: evaluation",
    f"[3/3] {root}: report",
  ]
  commands = [shlex.split(line) for line in lines if line.startswith("  ")]
  assert [command[2] for command in commands] == [
    *2 * ["beyond_outliers.main"],
    "beyond_outliers.evaluate",
    "beyond_outliers.analysis",
  ]
  assert f"--workdir={root}/learning_rate=0.003,seed=0" in commands[1]
  assert [command[-1].split(",")[1:] for command in commands[:2]] == [["2", "0"], ["2", "1"]]
  assert not root.exists()
