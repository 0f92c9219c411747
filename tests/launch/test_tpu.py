"""Queued resources: the commands in their order, values that pass three shells as they are, and
what happens here when one fails."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import commands
import pytest

from beyond_outliers.errors import ConfigError
from launch import tpu, tpus
from launch.jobs import Job

ROOT = pathlib.Path(__file__).parents[2]
IMAGE = "us-docker.pkg.dev/project/beyond_outliers:1"

# Stands for gcloud and, as what it is called, for the programs on a TPU's host: notes its words,
# and does what they would let happen. The code that a unit ended with is in a file of its name.
FAKE = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
here = pathlib.Path(sys.argv[0]).parent
if name == "sudo":
  os.execvp(words[0], words)
with open(here / "calls.jsonl", "a") as file:
  file.write(json.dumps([name, *words]) + "\\n")
if name == "gcloud" and "ssh" in words:
  (command,) = [word[10:] for word in words if word.startswith("--command=")]
  sys.exit(subprocess.run(["bash", "-c", command]).returncode)
state = here / "state"
if name == "gcloud" and "describe" in words:
  print(state.read_text() if state.exists() else sys.exit(1))
if name == "gcloud" and "create" in words:
  state.write_text("ACTIVE")
if name == "systemctl" and words[0] == "is-active":
  print("inactive")
  sys.exit(3)
if name == "systemctl" and words[0] == "show":
  code = here / words[1]
  print(code.read_text() if code.exists() else 0)
"""
PROGRAMS = ("gcloud", "sudo", "systemctl", "systemd-run", "journalctl", "docker")


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """A folder of these programs, ahead of the others, with their `calls()`."""
  for name in PROGRAMS:
    (tmp_path / name).write_text(FAKE)
    (tmp_path / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
  return tmp_path


def calls(folder):
  path = folder / "calls.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def resource(accelerator="v5p-128", slices=1, **more):
  return tpu.Resource("sweep-1", "us-east5-a", tpus.parse(accelerator), slices, **more)


def words_of(script):
  return shlex.split(script.replace("\\\n", " "))


def train(*arguments, name="a"):
  return Job(f"train-{name}", "train", "beyond_outliers.main", arguments, f"gs://bucket/{name}")


def evaluation(name="a", after=("train-a",)):
  return Job(f"eval-{name}", "evaluate", "beyond_outliers.evaluate", (), "gs://bucket/a", after)


REPORT = Job("report", "report", "beyond_outliers.analysis", (), "gs://bucket", ("train-a",))
LISTED = [train(name="a"), train(name="b"), evaluation(), REPORT]


def test_each_evaluation_runs_right_behind_its_training():
  turns = [job.name for job in tpu.in_turn(LISTED)]
  assert turns == ["train-a", "eval-a", "train-b", "report"]


def test_an_evaluation_beside_its_training_is_refused():
  with pytest.raises(
    ConfigError, match=r"--evaluate=beside: only one program .* give --evaluate=behind"
  ):
    list(tpu.steps([train(), evaluation(after=())], resource(), IMAGE))


def test_several_slices_come_and_go_together():
  created = tpu.create(resource(slices=2, project="p", spot=True, service_account="a@b"))
  *_, asked = created.split("||\n")
  assert words_of(asked) == [
    *("gcloud", "compute", "tpus", "queued-resources", "create", "sweep-1"),
    *("--zone=us-east5-a", "--project=p", "--accelerator-type=v5p-128"),
    *("--runtime-version=v2-alpha-tpuv5", "--node-count=2", "--node-prefix=sweep-1"),
    *("--service-account=a@b", "--spot"),
  ]
  assert "--node-id=sweep-1" in tpu.create(resource())


HOSTILE = [
  "$(id)",
  "`id`",
  "'",
  '"',
  "a b",
  "$HOME",
  "$$",
  "\\",
  "line\nbreak",
  "*",
  "; exit 9",
  "&",
]


def test_values_pass_every_shell_as_they_are(machine):
  """This one's, the host's, and the unit's, where systemd puts variables in for $NAME, and one $
  for two."""
  job = train(*HOSTILE)
  (start,) = [s for s in tpu.steps([job], resource(), IMAGE) if s.title == "start train-a"]
  subprocess.run(["bash", "-c", start.command], check=True)
  (unit,) = [words for words in calls(machine) if words[0] == "systemd-run"]
  program = unit[unit.index(IMAGE) :]
  assert [word.replace("$$", "$") for word in program] == [
    *(IMAGE, "-m", "beyond_outliers.main", *HOSTILE, "--distributed=auto")
  ]
  assert all(word.replace("$$", "").count("$") == 0 for word in program)
  assert {f"--property=RestartPreventExitStatus={code}" for code in (2, 3)} < set(unit)
  assert "--property=Restart=on-failure" in unit  # 42 and 1


@pytest.mark.parametrize(
  ("accelerator", "slices", "told"),
  [
    ("v5litepod-8", 1, []),
    ("v5litepod-256", 1, ["--distributed=auto"]),
    ("v5p-128", 2, ["--distributed=auto", "--config.mesh.dcn_data=2"]),
  ],
)
def test_a_run_is_told_of_other_hosts_and_slices(accelerator, slices, told):
  every = tpu.steps([train("--x=1")], resource(accelerator, slices), IMAGE)
  (start,) = [words_of(step.command) for step in every if step.title == "start train-a"]
  words = words_of(start[-1].removeprefix("--command="))
  assert words[words.index("--x=1") + 1 :] == [*told, "}"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_commands_are_sound_to_shellcheck():
  listed = [train(*HOSTILE), evaluation(), REPORT]
  for step in tpu.steps(listed, resource(slices=2), IMAGE):
    words = shlex.split(step.command) if " ssh " in step.command else []
    remote = [word[10:] for word in words if word.startswith("--command=")]
    for script in [step.command, *remote]:
      checked = subprocess.run(
        ["shellcheck", "--shell=bash", "--severity=warning", "-"],
        input=script,
        capture_output=True,
        text=True,
      )
      assert checked.returncode == 0, f"{script}\n{checked.stdout}"


ARGUMENTS = (
  *("--config=configs/adamw.py", "--root=gs://bucket/sweep", f"--image={IMAGE}"),
  *("--accelerator=v5litepod-16", "--zone=z", "--where=seed=0,optimizer.learning_rate=0.003"),
)


def launch(*arguments):
  return commands.run("launch.tpu", *commands.instead(ARGUMENTS, arguments))


def test_all_steps_run_in_order_and_the_slices_are_given_back(machine):
  result = launch("--evaluate=behind")
  assert result.returncode == 0, result.stderr
  verbs = [words[4] for words in calls(machine) if words[:2] == ["gcloud", "compute"]]
  assert verbs == ["describe", "create", "describe", "ssh", *4 * ["ssh"], "delete"]
  units = [words[1] for words in calls(machine) if words[0] == "systemd-run"]
  name = "learning-rate-0-003-seed-0"
  assert units == [f"--unit=train-{name}", f"--unit=eval-{name}"]


@pytest.mark.parametrize(("code", "exit_code"), [(3, 0), (2, 1)])
def test_a_run_that_failed_is_said_and_the_slices_are_given_back(machine, code, exit_code):
  (machine / "train-learning-rate-0-003-seed-0").write_text(str(code))
  result = launch("--evaluate=behind")
  assert result.returncode == exit_code, result.stderr
  units = [words[1] for words in calls(machine) if words[0] == "systemd-run"]
  assert len(units) == (1 if exit_code else 2)  # no evaluation of a run that did not end
  assert (f"until it ends (exit code {code})" in result.stderr) == bool(exit_code)
  assert "delete" in calls(machine)[-1]


def test_slices_that_will_never_be_there_end_it(machine):
  (machine / "state").write_text("SUSPENDED")
  result = launch()
  assert result.returncode == 1 and "SUSPENDED: delete it (--steps=delete)" in result.stderr
  assert not [words for words in calls(machine) if "ssh" in words]


def test_some_steps_alone(machine):
  result = launch("--steps=delete")
  assert result.returncode == 0
  assert [words[4] for words in calls(machine)] == ["delete"]


REFUSED = {
  "--steps=destroy": "--steps=destroy: no destroy; of create, setup, run, delete",
  "--root=runs/here": "--root=runs/here: would be lost with the machine that writes there",
  "--config=/etc/adamw.py": "there is no such file",
  "--accelerator=v5p-9": "--accelerator=v5p-9: slices of v5p have 8, 16",
  "--zone=a b": "--zone=a b: expected lower-case letters",
  "--image=a b": "--image=a b: expected REGISTRY/NAME:TAG",
  "--name=-x": "--name=-x: expected lower-case letters",
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_refusal_is_one_line_before_anything_starts(machine, given):
  result = launch(given)
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
  assert result.stderr.startswith("error: ") and REFUSED[given] in result.stderr
  assert not calls(machine)


def test_without_gcloud_it_says_so(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  result = launch()
  assert result.returncode == 2 and result.stderr.startswith("error: gcloud: is not installed")
