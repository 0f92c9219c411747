"""Slurm's scripts, as Bash and sbatch take them, with stand-ins for srun and scontrol."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import commands
import pytest

from beyond_outliers.errors import ConfigError
from launch import jobs, sbatch, slurm

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = "a b'c\"d$(touch pwned)\n`touch pwned`;é\\n*"
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=f"{sys.prefix}/bin")


def sweep(count=3, evaluate=True, report=True, argument=HOSTILE):
  listed = [
    jobs.Job(f"train-{i}", "train", "beyond_outliers.main", (f"--x={argument}", f"-{i}"), f"w{i}")
    for i in range(count)
  ]
  listed += [
    jobs.Job(f"eval-{i}", "evaluate", "beyond_outliers.evaluate", (f"{i}",), f"w{i}", (job.name,))
    for i, job in enumerate(listed if evaluate else ())
  ]
  if report:
    after = tuple(job.name for job in listed)
    listed.append(jobs.Job("report", "report", "beyond_outliers.analysis", ("--a",), "w", after))
  return listed


def options(tmp_path, **changes):
  folder = tmp_path / 'it\'s "a" #b $(x) %A'
  (folder / "logs").mkdir(parents=True, exist_ok=True)
  return sbatch.Options(**{"folder": str(folder), "clone": str(tmp_path), "title": "t", **changes})


def directives(script):
  """{option: value} of #SBATCH lines, by sbatch's rules for quotes: for these, Python's."""
  words = [
    shlex.split(line.removeprefix("#SBATCH "), posix=True)
    for line in script.splitlines()
    if line.startswith("#SBATCH ")
  ]
  assert all(len(word) == 1 for word in words), words
  return dict(word[0].removeprefix("--").partition("=")[::2] for word in words)


def run_script(script, tmp_path, index, code=0, state="RUNNING"):
  """(exit code of the script, arguments that srun got, what scontrol was asked) under stand-ins."""
  tools = tmp_path / "tools"
  tools.mkdir(exist_ok=True)
  (tools / "srun").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/srun\nexit {code}\n')
  (tools / "scontrol").write_text(
    f'#!/bin/bash\necho "$*" >> {tmp_path}/scontrol\n'
    f'if [ "$1" = show ]; then echo "   JobState={state} Reason=None"; fi\n'
  )
  for tool in tools.iterdir():
    tool.chmod(0o755)
  (tmp_path / "scontrol").write_text("")
  ids = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(index)}
  found = subprocess.run(
    ["bash"],
    input=script,
    env={**os.environ, **ids, "PATH": f"{tools}:{os.environ['PATH']}"},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert not found.stderr and not (tmp_path / "pwned").exists(), found.stderr
  arguments = (tmp_path / "srun").read_text().split("\0")[:-1]
  return found.returncode, arguments, (tmp_path / "scontrol").read_text().splitlines()


def test_arguments_reach_the_run_as_they_are(tmp_path):
  made = sbatch.scripts(sweep(), options(tmp_path, python="/a b/python"))
  for index in range(3):
    _, arguments, _ = run_script(made["train"], tmp_path, index)
    command = ["/a b/python", "-m", "beyond_outliers.main", f"--x={HOSTILE}", f"-{index}"]
    assert arguments == ["--kill-on-bad-exit=0", *command]
    assert run_script(made["evaluate"], tmp_path, index)[1][-2:] == [
      "beyond_outliers.evaluate",
      str(index),
    ]


# kind, exit code of the run, state of the job -> (exit code of the script, whether it is requeued)
ENDS = {
  ("train", 0, "RUNNING"): (0, False),
  ("train", 3, "RUNNING"): (0, False),  # diverged
  ("train", 2, "RUNNING"): (2, False),
  ("train", 42, "RUNNING"): (42, True),
  ("train", 42, "COMPLETING"): (42, False),  # cancelled
  ("train", 1, "RUNNING"): (1, True),
  ("train", 137, "RUNNING"): (137, True),
  ("train", 143, "COMPLETING"): (143, False),
  ("evaluate", 1, "RUNNING"): (1, True),
  ("evaluate", 2, "RUNNING"): (2, False),
}


@pytest.mark.parametrize("kind, code, state", ENDS)
def test_exit_codes_say_what_comes_next(tmp_path, kind, code, state):
  """For this task alone, although the number of an array's last task is also the whole array's."""
  made = sbatch.scripts(sweep(), options(tmp_path, restarts=1))[kind]
  ended, _, asked = run_script(made, tmp_path, 2, code, state)
  assert (ended, "requeue 7_2" in asked) == ENDS[kind, code, state]
  assert all("7_2" in question for question in asked)


def test_what_fails_is_requeued_as_often_as_asked_and_what_is_stopped_always(tmp_path):
  made = sbatch.scripts(sweep(), options(tmp_path, restarts=2))["train"]
  given = [run_script(made, tmp_path, 0, code)[2] for code in (1, 42, 1, 42, 42, 1)]
  assert ["requeue 7_0" in asked for asked in given] == [True, True, True, True, True, False]
  never = sbatch.scripts(sweep(), options(tmp_path, restarts=0))["train"]
  assert run_script(never, tmp_path, 1, 1) == (1, run_script(never, tmp_path, 1, 1)[1], [])


@pytest.mark.parametrize("code, asked", [(0, ""), (3, ""), (42, ""), (2, "9_2"), (137, "9_2")])
def test_a_training_that_fails_ends_the_evaluation_beside_it(tmp_path, code, asked):
  """It would wait for checkpoints, occupying a node, until its time limit."""
  listed = jobs.describe("configs/soap.py", "r", ["seed=0"], evaluate="beside")
  tools = tmp_path / "tools"
  tools.mkdir()
  (tools / "squeue").write_text("#!/bin/bash\nprintf '9_%s\\n' 0 1 2 12\n")
  (tools / "scancel").write_text(f'#!/bin/bash\nprintf %s "$*" > {tmp_path}/cancelled\n')
  run_script(sbatch.scripts(listed, options(tmp_path))["train"], tmp_path, 2, code)
  cancelled = tmp_path / "cancelled"
  assert (cancelled.read_text() if cancelled.exists() else "") == asked


def test_directives(tmp_path):
  made = sbatch.scripts(
    sweep(),
    options(
      tmp_path,
      nodes=2,
      tasks_per_node=4,
      gpus_per_task=2,
      parallel=2,
      lead=120,
      sbatch=("--time=1:00:00", '--comment=it\'s "mine" #1'),
      evaluate_sbatch=("--time=10",),
    ),
  )
  train, evaluate, report = (directives(made[kind]) for kind in ("train", "evaluate", "report"))
  folder = str(tmp_path / 'it\'s "a" #b $(x) %%A')
  assert train == {
    "job-name": "t-train",
    "array": "0-2%2",
    "output": f"{folder}/logs/%x_%a.txt",
    "open-mode": "append",
    "nodes": "2",
    "ntasks-per-node": "4",
    "gpus-per-task": "2",
    "requeue": "",
    "signal": "USR1@120",
    "time": "1:00:00",
    "comment": 'it\'s "mine" #1',
  }
  assert "export JAX_LOCAL_DEVICE_IDS=0,1\n" in made["train"]
  assert run_script(made["train"], tmp_path, 0)[1][-1] == "--distributed=auto"
  assert (evaluate["nodes"], evaluate["ntasks-per-node"]) == ("1", "1")
  assert (evaluate["gpus-per-task"], evaluate["time"]) == ("1", "10")
  assert (
    "signal" not in evaluate
    and "gpus-per-task" not in report
    and "--distributed" not in made["evaluate"]
  )


@pytest.mark.parametrize("what", ["\\", "\n"])
def test_folders_that_slurm_cannot_have_logs_in_are_refused(tmp_path, what):
  with pytest.raises(ConfigError, match=r"give a (path|name) without"):
    sbatch.scripts(sweep(), options(tmp_path, folder=f"/a{what}b"))


@pytest.mark.parametrize("image", ["/a b/image.sif", "docker://x/y:1"])
def test_in_a_container_of_apptainer(tmp_path, image):
  given = options(tmp_path, folder="/a b", container=image)
  _, arguments, _ = run_script(sbatch.scripts(sweep(), given)["train"], tmp_path, 0)
  clone = str(tmp_path)
  assert arguments[1:-2] == [
    *("apptainer", "exec", "--nv", "--bind", clone, "--bind", "/a b", "--pwd", clone, image),
    *("python", "-m", "beyond_outliers.main"),
  ]


def test_in_a_container_of_pyxis(tmp_path):
  given = options(tmp_path, folder="/a", container="nvcr.io#nvidia/jax:1")
  _, arguments, _ = run_script(sbatch.scripts(sweep(), given)["train"], tmp_path, 0)
  assert arguments[1:4] == [
    "--container-image=nvcr.io#nvidia/jax:1",
    f"--container-mounts={tmp_path}:{tmp_path},/a:/a",
    f"--container-workdir={tmp_path}",
  ]
  for folder in ("/a,b", "/a b"):
    with pytest.raises(ConfigError, match="without , : and spaces"):
      sbatch.scripts(sweep(), options(tmp_path, folder=folder, container="dockerd://x"))


def test_an_image_in_a_file_is_no_name_of_a_registry(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "jax.sqsh").touch()
  assert slurm._image("jax.sqsh") == str(tmp_path / "jax.sqsh")
  assert slurm._image("nvcr.io#nvidia/jax:1") == "nvcr.io#nvidia/jax:1"


def test_what_waits_for_what(tmp_path):
  """Of a run that ended only the evaluation is submitted, at once; the report waits for all."""
  given = options(tmp_path, parallel=2)

  def commands(listed, ended=()):
    made = sbatch.submissions(listed, ended)
    ids = [str(100 + i) for i in range(len(made))]
    return [sbatch.command(one, given, ids)[2:] for one in made]

  def script(kind):
    return f"{given.folder}/slurm/{kind}.sh"

  never = "--kill-on-invalid-dep=yes"
  assert commands(sweep()) == [
    ["--array=0,1,2%2", script("train")],
    ["--array=0,1,2%2", "--dependency=aftercorr:100", never, script("evaluate")],
    ["--array=0%2", "--dependency=afterany:100:101", never, script("report")],
  ]
  assert commands(sweep(), {"w1"}) == [
    ["--array=0,2%2", script("train")],
    ["--array=0,2%2", "--dependency=aftercorr:100", never, script("evaluate")],
    ["--array=1%2", script("evaluate")],
    ["--array=0%2", "--dependency=afterany:100:101:102", never, script("report")],
  ]
  assert commands(sweep(evaluate=False), {"w0", "w1", "w2"}) == [["--array=0%2", script("report")]]
  beside = jobs.describe("configs/soap.py", "r", ["seed=0"], evaluate="beside")
  assert commands(beside) == [
    ["--array=0,1,2,3,4,5%2", script("train")],
    ["--array=0,1,2,3,4,5%2", script("evaluate")],
  ]


@pytest.mark.skipif(not SHELLCHECK, reason="no shellcheck: apt-get install shellcheck")
@pytest.mark.parametrize("changes", [{}, {"restarts": 1, "gpus_per_task": 8, "nodes": 2}])
def test_scripts_please_shellcheck(tmp_path, changes):
  listed = [dataclasses.replace(job, after=()) if changes else job for job in sweep()]
  for kind, script in sbatch.scripts(listed, options(tmp_path, **changes)).items():
    found = subprocess.run(
      # Without the hint that single quotes keep what is in them from being expanded: so they do.
      [str(SHELLCHECK), "--shell=bash", "--exclude=SC2016", "-"],
      input=script,
      capture_output=True,
      text=True,
    )
    assert found.returncode == 0, f"{kind}: {found.stdout}"


def launch(*arguments, **environment):
  return commands.run("launch.slurm", *arguments, **environment)


def test_a_dry_run_is_a_script_that_would_submit(tmp_path):
  root = tmp_path / "it's $(touch pwned)"
  result = launch("--config=configs/soap.py", f"--root={root}", "--evaluate=behind", "--dry_run")
  assert result.returncode == 0 and not root.exists(), result.stderr
  submitting = result.stdout[result.stdout.index("\nmkdir -p") :]
  said = subprocess.run(
    ["bash", "-c", f'sbatch() {{ printf "<%s>" "$@" >&2; echo 5; }}; cd {tmp_path}\n{submitting}'],
    capture_output=True,
    text=True,
  ).stderr
  assert f"<--dependency=aftercorr:5><--kill-on-invalid-dep=yes><{root}/slurm/evaluate.sh>" in said
  assert (root / "logs").is_dir() and not (tmp_path / "pwned").exists()


REFUSED = {
  "no slurm": ([], "there is no Slurm here"),
  "an option": (["--sbatch=-p h100"], "expected --option=value of sbatch"),
  "a quote": (["--sbatch=--comment='a"], "No closing quotation"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, what):
  arguments, line = REFUSED[what]
  given = ["--config=configs/adamw.py", f"--root={tmp_path}/runs", *arguments]
  result = launch(*given, PATH=str(tmp_path))
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
  assert line in result.stderr and not (tmp_path / "runs").exists()
