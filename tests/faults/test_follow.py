"""An evaluation job beside a real training process, through all that can happen to either."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import commands
import pytest

from beyond_outliers import runs

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 200
pytestmark = pytest.mark.slow


def start(module, *flags, **settings):
  return commands.start(f"beyond_outliers.{module}", *flags, **settings)


def finish(process, expected=0):
  return commands.finish(process, expected, timeout=900)


def wait_until(condition, *processes):
  """Errors: AssertionError with what a process said that ended first."""
  deadline = time.monotonic() + 600
  while not condition():
    for process in processes:
      assert process.poll() is None, process.communicate()[0][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)


def steps_of(workdir):
  folder = workdir / "checkpoints"
  return (
    sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    if folder.exists()
    else []
  )


def cells_of(workdir):
  folder = workdir / "eval"
  return (
    {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    if folder.exists()
    else {}
  )


def evaluated(workdir):
  """Steps that have a cell."""
  return sorted(int(name.partition("-")[0]) for name in cells_of(workdir))


@pytest.fixture(scope="module")
def training(tiny):
  """The flags of a training process."""
  config = tiny(
    **{
      "steps": STEPS,
      "checkpoint.every": 40,
      "checkpoint.keep": 2,
      "eval.every": STEPS,
      "log.every": 50,
      "model.blocks": 1,
      "log.tensorboard": True,
    }
  )
  return lambda workdir: ["main", f"--config=configs/adamw.py:{config}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def alone(training, tmp_path_factory):
  """A run that nothing stops and nobody follows."""
  workdir = tmp_path_factory.mktemp("follow") / "alone"
  finish(start(*training(workdir)))
  return workdir


def test_follows_a_run_that_is_killed_and_resumed_and_is_killed_itself(training, alone, tmp_path):
  """It begins before the run does, ends with it, has every cell of every checkpoint that it saw
  once, and the run is bitwise the one that nobody followed."""
  workdir = tmp_path / "run"
  following = [
    "evaluate",
    f"--workdir={workdir}",
    "--follow",
    "--poll=0.1",
    "--recipes=rtn_w4a4",
    "--documents=1",
  ]
  job = start(*following)
  time.sleep(1.0)
  trainer = start(*training(workdir))
  wait_until(lambda: steps_of(workdir), trainer, job)
  trainer.kill()
  finish(trainer, -signal.SIGKILL)
  wait_until(lambda: cells_of(workdir), job)
  assert runs.open(workdir).status["status"] == "running", "nobody wrote down that it was killed"
  job.kill()
  assert f"waiting for a run in {workdir}" in finish(job, -signal.SIGKILL)
  before = cells_of(workdir)

  job, trainer = start(*following), start(*training(workdir))
  assert "resuming from step" in finish(trainer)
  output = finish(job)
  after = cells_of(workdir)
  assert {name: after[name] for name in before} == before, "finished cells were measured again"
  for step in steps_of(workdir):
    for name in ("none-none", "rtn_w4a4-rtn"):
      (path,) = (workdir / "eval").glob(f"{step}-{name}-*.json")
      assert json.loads(path.read_text())["metrics"]["loss"] > 0
  assert len([line for line in output.splitlines() if line.startswith(f"{STEPS} ")]) == 2, (
    "the table has the last step"
  )
  assert not [path for path in (workdir / "eval").iterdir() if path.suffix != ".json"]
  assert steps_of(workdir) == steps_of(alone) and runs.open(workdir).status["status"] == "done"
  one, other = (runs.open(path).metrics()[["train/loss", "eval/loss"]] for path in (alone, workdir))
  assert one.equals(other)
  assert list((workdir / "tensorboard" / "eval").iterdir())


# Training deletes the oldest checkpoint while the job reads it: here always between its SHA-256
# sums and its arrays.
DELETES = """
import pathlib, shutil
from beyond_outliers import cli
from beyond_outliers.checkpoint import recovery
from beyond_outliers.evaluate import __main__ as evaluate
check = recovery.mismatch
def check_and_lose(directory):
  verdict = check(directory)
  if directory.name == "10":
    shutil.rmtree(directory)
  return verdict
recovery.mismatch = check_and_lose
cli.run_command(evaluate.main)
"""


def test_what_disappears_or_is_damaged_is_reported_and_skipped(alone, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(alone, workdir)
  checkpoints = workdir / "checkpoints"
  for step in (10, 20, 30):
    shutil.copytree(checkpoints / str(STEPS), checkpoints / str(step))
  largest = max((checkpoints / "20").rglob("*"), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1  # which Orbax alone does not notice
  largest.write_bytes(content)
  shutil.rmtree(checkpoints / "30" / "state")
  (
    checkpoints / "30" / "sha256.json"
  ).unlink()  # as of a run that was killed before it could write that

  flags = [f"--workdir={workdir}", "--follow", "--poll=0.1", "--documents=1"]
  process = subprocess.run(
    [sys.executable, "-c", DELETES, *flags], cwd=ROOT, capture_output=True, text=True, timeout=600
  )
  assert process.returncode == 0, process.stderr
  for told in (process.stdout, process.stderr):
    assert "10 skipped: deleted" in told.replace("· ", "")
    assert "20 skipped: " in told.replace("· ", "") and "does not match its SHA-256 sum" in told
    assert "30 skipped: " in told.replace("· ", "")
  assert evaluated(workdir) == steps_of(alone)
  assert steps_of(workdir) == [20, 30, *steps_of(alone)], "a job never touches the run's files"
  assert not list(checkpoints.glob("damaged-*"))

  # The newest by default: what is damaged gives way to the one before it, which was not asked for;
  # all damaged is an error.
  shutil.rmtree(checkpoints / str(STEPS))
  shutil.copytree(checkpoints / "20", checkpoints / str(STEPS))
  shutil.rmtree(workdir / "eval")
  finish(start("evaluate", f"--workdir={workdir}", "--documents=1"), 1)
  assert evaluated(workdir) == [steps_of(alone)[-2]]
  output = finish(start("evaluate", f"--workdir={workdir}", "--steps=20"), 2)
  assert (
    output.splitlines()[-1].startswith("error: ") and "no checkpoint could be evaluated" in output
  )
