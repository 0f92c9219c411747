"""A real Slurm of one node runs sweeps: what is stopped goes on, and what is cancelled does not.

It needs Debian's slurm-wlm and munge, and to be root; `slurm_node.sh` starts it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from beyond_outliers import runs
from launch import jobs, sbatch

ROOT = pathlib.Path(__file__).parents[2]
NODE = pathlib.Path(__file__).with_name("slurm_node.sh")
MISSING = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name)]

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: apt-get install slurm-wlm munge"),
  pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs jobs as root alone"),
]

# Says when it starts and how it ends; its first start waits until it is asked to stop.
PROGRAM = """
import json, os, signal, sys, time
name, do, events = sys.argv[1:4]
restarts, asked = os.environ.get("SLURM_RESTART_COUNT", "0"), []

def say(what):
  with open(events, "a") as file:
    file.write(json.dumps([name, what, restarts, sys.argv[4:]]) + chr(10))

for number in (signal.SIGTERM, signal.SIGUSR1):
  signal.signal(number, lambda number, frame: asked.append(number))
say("start")
until = time.monotonic() + (200 if do == "wait" and restarts == "0" else 0)
while not asked and time.monotonic() < until:
  time.sleep(0.01)
say("saved" if asked else "end")
sys.exit(42 if asked else int(do) if do.isdigit() else 0)
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
  folder = tmp_path_factory.mktemp("node")
  os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
  try:
    subprocess.run([NODE, "start", folder], check=True)
    yield
  finally:
    subprocess.run([NODE, "stop", folder], check=True)
    del os.environ["SLURM_CONF"]


def ask(*command):
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_for(condition, seconds=240):
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, ask("scontrol", "show", "jobs")
    time.sleep(0.1)


def queue_is_empty():
  return not ask("squeue", "--noheader")


def test_each_end_has_its_consequence(node, tmp_path):
  """The last task, too, whose number is its array's: it is requeued without the others."""
  (tmp_path / "program.py").write_text(PROGRAM)
  folder, hostile = tmp_path / 'it\'s "a" #b $(x) %A', "a b'c\"d$(touch pwned)\n`x`;é\\n*"
  for name in ("logs", "slurm"):
    (folder / name).mkdir(parents=True)
  events = folder / "events"
  does = ("0", "3", "2", "1", "wait", "wait", "wait")
  listed = [
    jobs.Job(f"train-{i}", "train", "program", (f"train-{i}", do, str(events), hostile), f"w{i}")
    for i, do in enumerate(does)
  ]
  listed += [
    jobs.Job(f"eval-{i}", "evaluate", "program", (f"eval-{i}", "0", str(events)), f"w{i}", ("x",))
    for i in range(len(does))
  ]
  listed.append(jobs.Job("report", "report", "program", ("report", "0", str(events)), "w", ("x",)))
  given = sbatch.Options(str(folder), str(tmp_path), "t", restarts=1, python=sys.executable)
  for kind, text in sbatch.scripts(listed, given).items():
    (folder / "slurm" / f"{kind}.sh").write_text(text)
  ids = []
  for submission in sbatch.submissions(listed, ()):
    ids.append(ask(*sbatch.command(submission, given, ids)).strip())

  def said():
    lines = events.read_text().splitlines() if events.exists() else []
    return [json.loads(line) for line in lines]

  def has(name, what):
    return any(event[:2] == [name, what] for event in said())

  for task, signal in ((4, ["--signal=TERM"]), (5, []), (6, ["--signal=USR1"])):
    wait_for(lambda name=f"train-{task}": has(name, "start"))
    ask("scancel", *signal, f"{ids[0]}_{task}")
  wait_for(queue_is_empty)
  assert all(event[3] == [hostile] for event in said() if event[0].startswith("train"))
  told = {name: [event[1:3] for event in said() if event[0] == name] for name, *_ in said()}
  once, again = [["start", "0"], ["end", "0"]], [["start", "1"], ["end", "1"]]
  stopped = [["start", "0"], ["saved", "0"]]
  assert told == {
    "train-0": once,
    "train-1": once,
    "train-2": once,
    "train-3": once + again,  # failed
    "train-4": stopped + again,
    "train-5": stopped,  # cancelled
    "train-6": stopped + again,
    **dict.fromkeys(("eval-0", "eval-1", "eval-4", "eval-6", "report"), once),
  }
  assert said()[-1][0] == "report" and not (tmp_path / "pwned").exists()


def test_an_evaluation_beside_ends_with_a_training_that_was_refused(node, tmp_path):
  """The other's goes on until it has all."""
  (tmp_path / "program.py").write_text(PROGRAM)
  for name in ("logs", "slurm"):
    (tmp_path / name).mkdir()
  events = tmp_path / "events"
  listed = [
    jobs.Job(f"{kind}-{i}", kind, "program", (f"{kind}-{i}", do, str(events)), f"w{i}")
    for kind, does in (("train", "20"), ("evaluate", ("wait", "0")))
    for i, do in enumerate(does)
  ]
  given = sbatch.Options(
    *(str(tmp_path), str(tmp_path), "beside"),
    python=sys.executable,
    sbatch=("--begin=now+4",),
    evaluate_sbatch=("--begin=now",),
  )
  for kind, text in sbatch.scripts(listed, given).items():
    (tmp_path / "slurm" / f"{kind}.sh").write_text(text)
  for submission in sbatch.submissions(listed, ()):
    ask(*sbatch.command(submission, given, ()))
  wait_for(queue_is_empty, 100)
  told = [json.loads(line)[:2] for line in events.read_text().splitlines()]
  assert [what for name, what in told if name == "evaluate-0"] == ["start", "saved"]
  assert [what for name, what in told if name == "evaluate-1"] == ["start", "end"]
  assert ["train-0", "end"] in told and ["train-1", "end"] in told


def test_a_sweep_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(node, tiny, tmp_path):
  """Two runs with evaluations behind them; both are stopped, and Slurm starts them again. The last
  checkpoint equals that of an undisturbed run, to the bit."""
  config = tmp_path / "a sweep.py"
  config.write_text(
    "from configs.adamw import get_config\n"
    "def get_hyper(h):\n  return h.sweep('optimizer.learning_rate', [1e-3, 3e-3])\n"
  )
  argument = f"--config={config}:{tiny(steps=200)},checkpoint.every=100"
  root = tmp_path / "it's a sweep"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  launching = [sys.executable, "-m", "launch.slurm", argument, f"--root={root}"]
  launching += ["--evaluate=behind", "--evaluate_flags=--recipes=rtn_w4a4 --documents=2"]
  said = subprocess.run(
    launching, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
  ).stdout
  (array,) = (
    line.split()[1].rstrip(":") for line in said.splitlines() if line.endswith("train.sh'")
  )
  twice = subprocess.run(launching, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert twice.returncode == 2 and "are in the queue; wait for them" in twice.stderr
  workdirs = [root / f"learning_rate={rate}" for rate in ("0.001", "0.003")]
  for task, workdir in enumerate(workdirs):
    wait_for(lambda rows=workdir / "metrics.jsonl": rows.exists() and rows.stat().st_size)
    ask("scancel", "--signal=TERM", f"{array}_{task}")
  wait_for(
    lambda: all(
      json.loads((w / "status.json").read_text())["status"] == "preempted" for w in workdirs
    )
  )
  wait_for(queue_is_empty, 400)
  for task, workdir in enumerate(workdirs):
    log = next((root / "logs").glob(f"*-train_{task}.txt")).read_text()
    assert log.count("exit code 42: queued again") == 1, log
    assert list((workdir / "eval").glob("200-rtn_w4a4-*.json"))
  alone = tmp_path / "alone"
  settings = [argument, f"--workdir={alone}", "--config.optimizer.learning_rate=0.003"]
  command = [sys.executable, "-m", "beyond_outliers.main", *settings]
  subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
  assert bytes_of(workdirs[1]) == bytes_of(alone)


def bytes_of(workdir):
  """Of every parameter of the last checkpoint, and the losses of all steps."""
  opened = runs.open(workdir)
  assert opened.status["status"] == "done"
  rows = opened.metrics()
  losses = rows["train/loss"].dropna()
  assert len(losses) == 200
  leaves = jax.tree.leaves(opened.params())
  return [np.asarray(leaf).tobytes() for leaf in leaves], losses.tolist()
