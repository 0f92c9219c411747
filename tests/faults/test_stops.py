"""Real processes that share a workdir, or change in number; test_faults.py has damaged ones."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import commands
import numpy as np
import pytest

from beyond_outliers import cli, runs

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 300


@pytest.fixture(scope="module")
def argument(tiny):
  return lambda **more: tiny(
    **{"steps": STEPS, "checkpoint.every": 20, "eval.every": STEPS, "log.every": 50, **more}
  )


def start(argument, workdir, *flags, **environment):
  config = f"--config=configs/adamw.py:{argument}"
  return commands.start(
    "beyond_outliers.main", config, f"--workdir={workdir}", *flags, **environment
  )


def wait_for_step(process, workdir, step):
  """Until a checkpoint of that step or a later one is committed."""
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and process.poll() is None:
    checkpoints = workdir / "checkpoints"
    found = (
      [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]
      if checkpoints.exists()
      else []
    )
    if found and max(found) >= step:
      return
    time.sleep(0.002)
  raise AssertionError(
    f"no checkpoint {step}: "
    f"{process.communicate()[0][-3000:] if process.poll() is not None else 'timeout'}"
  )


READ_ONLY = f"""
import errno, os
from beyond_outliers import cli, main

makedirs = os.makedirs

def refuse(path, **options):
  if os.path.basename(path).startswith("{STEPS}.orbax"):
    raise OSError(errno.EROFS, "Read-only file system", path)
  makedirs(path, **options)

os.makedirs = refuse
cli.run_command(main.main)
"""


def test_a_checkpoint_that_cannot_begin_ends_the_run_with_its_reason(argument, tmp_path):
  """Orbax's threads, which wait five minutes for its folder, do not hold the process up."""
  flags = f"--config=configs/adamw.py:{argument()}", f"--workdir={tmp_path / 'run'}"
  command = [sys.executable, "-c", READ_ONLY, *flags]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
  last = ended.stderr.splitlines()[-1]
  assert ended.returncode == 1 and last.startswith("error: OSError: "), ended.stderr
  assert "could not be written ([Errno 30] Read-only" in last
  status = json.loads((tmp_path / "run" / "status.json").read_text())
  assert (status["status"], status["step"]) == ("failed", STEPS - 20) and status["reason"] in last


# Process 0 puts together what all have written, and has no room for it.
FULL = """
import errno
import orbax.checkpoint as ocp
from beyond_outliers import cli, main

def full(self, directory, **options):
  raise OSError(errno.ENOSPC, "No space left on device", str(directory))

ocp.StandardCheckpointHandler.finalize = full
cli.run_command(main.main)
"""


@pytest.mark.slow
def test_two_processes_end_where_the_first_cannot_put_a_checkpoint_together(argument, tmp_path):
  """At once: Orbax would have them wait for each other for 20 minutes."""
  flags = f"--config=configs/adamw.py:{argument()}", f"--workdir={tmp_path / 'run'}"
  address = f"127.0.0.1:{commands.free_port()}"
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", FULL, *flags, f"--distributed={address},2,{index}"],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  said = [process.communicate(timeout=400)[0] for process in pair]
  assert [process.returncode for process in pair] == [1, 1], said
  assert "could not be written ([Errno 28] No space left on device" in said[0]
  assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
  assert "process 0 of 2" in said[1], said[1]


def test_a_second_run_in_the_same_workdir_is_refused(argument, tmp_path):
  process = start(argument(), tmp_path / "run")
  wait_for_step(process, tmp_path / "run", 20)
  process.send_signal(signal.SIGSTOP)
  second = commands.finish(start(argument(), tmp_path / "run"), 2)
  assert f"is in use by process {process.pid}" in second
  process.kill()
  process.communicate()


# What a process does before it trains: it computes in C for minutes, as where XLA compiles.
STARTING = """
import hashlib
from beyond_outliers import cli

cli.end_when_asked()
print("starting", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_asked_to_stop_before_it_trains_a_run_ends_at_once(number):
  process = subprocess.Popen(
    [sys.executable, "-c", STARTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "starting\n"
  process.send_signal(number)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 42 and said.count("\n") == 1 and "asked to stop" in said


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["shards", "tfds"])
def test_two_processes_agree_to_stop_and_one_goes_on(argument, tmp_path, reader):
  """SIGTERM to one of two: both save the same step and exit 42; a lone process resumes from it,
  with the same batches."""
  arg = argument(
    **{"data.reader": reader, "optimizer.learning_rate": 1e-4}
  )  # low: rounding must not grow into chaos
  commands.finish(start(arg, tmp_path / "alone"))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  workdir = tmp_path / "two"
  pair = [start(arg, workdir, f"--distributed=127.0.0.1:{port},2,{index}") for index in range(2)]
  wait_for_step(pair[0], workdir, 60)
  pair[1].send_signal(signal.SIGTERM)
  for process in pair:
    commands.finish(process, 42)
  status = json.loads((workdir / "status.json").read_text())
  assert status["status"] == "preempted"
  assert runs.open(workdir).manifest["devices"]["processes"] == 2
  assert f"resuming from step {status['step']} of {STEPS}" in commands.finish(start(arg, workdir))
  one, two = runs.open(tmp_path / "alone"), runs.open(workdir)
  # Sums run in another order over two processes: equal up to that, not bitwise.
  np.testing.assert_allclose(two.metrics()["train/loss"], one.metrics()["train/loss"], rtol=1e-4)
  np.testing.assert_allclose(two.metrics()["eval/loss"], one.metrics()["eval/loss"], rtol=1e-4)
