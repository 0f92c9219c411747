"""Real processes of several devices each, as hosts have them: what they save together is restored
by other numbers of processes on other meshes, to the bit, and goes on alike."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import commands
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# A command that notes a digest of every parameter as it is saved and restored: $NOTES, kind, step.
RECORDED = """
import hashlib, importlib, json, os, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from beyond_outliers import checkpoint, cli
from beyond_outliers.params import leaves_by_path

def note(kind, step, params):
  whole = leaves_by_path(multihost_utils.process_allgather(params, tiled=True))
  digests = {path: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in whole.items()}
  if jax.process_index() == 0:
    with open(os.environ["NOTES"], "a") as file:
      print(json.dumps([kind, step, digests]), file=file)

save, restore = checkpoint.Checkpoints.save, checkpoint.Checkpoints.restore

def saving(self, step, state, *rest, **options):
  note("saved", step, state.params)
  return save(self, step, state, *rest, **options)

def restoring(self, *arguments):
  found = restore(self, *arguments)
  if found:
    note("restored", found[0], found[1].params)
  return found

checkpoint.Checkpoints.save, checkpoint.Checkpoints.restore = saving, restoring
sys.argv[0] = sys.argv[1]
cli.run_command(importlib.import_module("beyond_outliers." + sys.argv.pop(1)).main)
"""


def together(processes, devices, *command, notes=os.devnull, flag="", **environment):
  """Output of process 0 of so many processes with so many devices; {index} stands in environments
  and in the flag --distributed, by default of this machine's."""
  flag = flag or f"127.0.0.1:{commands.free_port()},{processes},{{index}}"
  started = [
    subprocess.Popen(
      [
        *(sys.executable, "-c", RECORDED, *command),
        *([f"--distributed={flag.format(index=index)}"] if processes > 1 else []),
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={
        **os.environ,
        "NOTES": str(notes),
        "JAX_NUM_CPU_DEVICES": str(devices),
        **{name: value.format(index=index) for name, value in environment.items()},
      },
    )
    for index in range(processes)
  ]
  said = [process.communicate(timeout=1800) for process in started]
  for process, (_, errors) in zip(started, said, strict=True):
    assert process.returncode == 0, errors[-4000:]
  return said[0]


def noted(path, kind, step):
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [digests for what, when, digests in lines if (what, when) == (kind, step)]


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = {row["step"]: row for row in map(json.loads, lines) if "train/loss" in row}
  return {step: row["train/loss"] for step, row in rows.items()}


def restored_elsewhere(argument, tmp_path, first, others, at=10):
  """Trains by `first` = (processes, devices, mesh), and goes on from the checkpoint `at` by each of
  the others; asserts that parameters were the same, and returns the losses of all."""
  found = []
  for number, (processes, devices, mesh) in enumerate([first, *others]):
    workdir, notes = tmp_path / str(number), tmp_path / f"{number}.notes"
    again = []
    if number:
      shutil.copytree(tmp_path / "0", workdir)
      again = [f"--from_step={at}"]
    axes = [
      f"--config.mesh.{name}={size}"
      for name, size in zip(("data", "fsdp", "model"), mesh, strict=True)
    ]
    command = ("main", f"--config=configs/shampoo.py:{argument}", f"--workdir={workdir}")
    together(processes, devices, *command, *axes, *again, notes=notes)
    if number:
      assert noted(notes, "restored", at) == noted(tmp_path / "0.notes", "saved", at)
    found.append(losses(workdir))
  return found


@pytest.mark.slow
def test_what_two_processes_save_other_processes_and_meshes_go_on_from(tiny, tmp_path):
  """With Shampoo, whose blocks are redistributed, in full precision: in four bits, another order of
  summation would move some activations to the next code. From step 20 on, roots amplify it up to
  6e-4: factors of few gradients have eigenvalues below float32's rounding."""
  argument = tiny(
    **{
      "steps": 12,
      "checkpoint.every": 10,
      "checkpoint.keep": 3,
      "model.blocks": 1,
      "model.heads": 4,
      "model.kv_heads": 2,
      "model.d_head": 64,
      "optimizer.learning_rate": 1e-3,
      "eval.every": 12,
    }
  )
  first, *others = restored_elsewhere(argument, tmp_path, (2, 4, (2, 2, 2)), [(1, 8, (1, 4, 2))])
  assert sorted(first) == list(range(1, 13))
  for other in others:
    np.testing.assert_allclose(
      [other[i] for i in (11, 12)], [first[i] for i in (11, 12)], atol=1e-5
    )


def slurm(tasks):
  """The variables that srun would set for so many tasks on this machine."""
  names = {
    "JOB_ID": "1",
    "STEP_ID": "0",
    "STEP_NODELIST": "localhost",
    "STEP_TASKS_PER_NODE": str(tasks),
    "NODEID": "0",
    "PROCID": "{index}",
    "LOCALID": "{index}",
  }
  found = {f"SLURM_{name}": value for name, value in names.items()}
  return {**found, "JAX_COORDINATOR_PORT": str(commands.free_port())}


@pytest.mark.slow
def test_two_tasks_of_slurm_train_and_evaluate_as_one_process_does(tiny, tmp_path):
  """Each evaluates its rows, and the first writes: cells are to the bit those of one process that
  has as many devices."""
  argument = tiny(**{"steps": 4, "checkpoint.every": 4, "model.blocks": 1, "eval.every": 4})
  run, auto = tmp_path / "run", {"flag": "auto", **slurm(2)}
  _, said = together(
    2, 1, "main", f"--config=configs/adamw.py:{argument}", f"--workdir={run}", **auto
  )
  assert said.startswith("process 0 of 2 (by Slurm), which meet at localhost:")
  assert json.loads((run / "manifest.json").read_text())["devices"]["processes"] == 2
  evaluation = (
    "evaluate.__main__",
    f"--workdir={run}",
    "--recipes=rtn_w4a4",
    "--methods=rtn,gptq",
    "--json",
  )
  alone, _ = together(1, 2, *evaluation, f"--out={tmp_path / 'alone'}")
  auto = {"flag": "auto", **slurm(2)}
  pair, _ = together(2, 1, *evaluation, f"--out={tmp_path / 'pair'}", **auto)
  # Behind what Gloo prints of its connections.
  cells = [json.loads(text.splitlines()[-1])["cells"] for text in (alone, pair)]
  assert len(cells[0]) == 3
  for one, other in zip(*cells, strict=True):
    assert one["metrics"] == other["metrics"] and one["settings"] == other["settings"]
  names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("alone", "pair")]
  assert names[0] == names[1] and len(names[0]) == 3
