"""The commands as a person types them: a refusal is one line and exit code 2, before anything long begins."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# what is wrong -> (arguments of main, what its one line on stderr holds)
REFUSED = {
  "a size": (["--config=configs/adamw.py:50q"], ["size = '50q'", "50m"]),
  "a key of the argument": (["--config=configs/adamw.py:nano,modle.heads=3"], ["modle: unknown key", "did you mean 'model'"]),
  "a key of a flag": (["--config=configs/adamw.py", "--config.model.hads=3"], ["unknown key 'hads'", "heads"]),
  "a value of a flag": (["--config=configs/adamw.py", "--config.steps=many"], ["config.steps=many"]),
  "a value": (["--config=configs/adamw.py", "--config.model.mlp=gelu"], ["model.mlp = 'gelu'", "'relu2', 'swiglu'"]),
  "a mesh": (["--config=configs/adamw.py:nano,mesh.data=3", "--dry_run"], ["mesh = ", "number of devices, 1"]),
  "a flag": (["--config=configs/adamw.py", "--wrkdir=x"], ["'wrkdir'"]),
  "no config": ([], ["--config"]),
  "a file that is not there": (["--config=configs/nobody.py"], ["configs/nobody.py"]),
  "how to find the others": (["--config=configs/adamw.py", "--distributed=here"], ["distributed", "HOST:PORT,COUNT,INDEX"]),
}

# Imports main once and gives each command a process of its own; then the default workdirs, flags parsed in this one.
COMMANDS = """
import json, os, sys, tempfile
from absl import flags
from beyond_outliers import command, config, main

answers = []
for arguments in json.loads(sys.argv[1]):
  with tempfile.TemporaryFile("w+") as errors:
    child = os.fork()
    if not child:
      os.dup2(errors.fileno(), 2)
      sys.argv = ["main", *arguments]
      command.run(main.main)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors.seek(0)
    answers.append([code, errors.read()])

def default_workdir(argument):
  flags.FLAGS.unparse_flags()
  flags.FLAGS(["main", "--config=" + argument])
  return main.default_workdir(config.resolve(main.CONFIG.value))

print(json.dumps({"answers": answers, "workdirs": [default_workdir(argument) for argument in json.loads(sys.argv[2])]}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("refused") / "run"
  commands = [[*arguments, f"--workdir={workdir}"] for arguments, _ in REFUSED.values()]
  process = subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(commands),
                            json.dumps(["configs/adamw.py", "configs/adamw.py:0.3m", "configs/adamw.py:50m,data.path=/a/b.c"])],
                           cwd=ROOT, capture_output=True, text=True, timeout=240)
  assert process.returncode == 0, process.stderr
  result = json.loads(process.stdout)
  assert not workdir.exists(), "a refused command left a workdir"
  return {**result, "answers": dict(zip(REFUSED, result["answers"], strict=True))}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_and_exit_code_2(told, what):
  code, errors = told["answers"][what]
  assert code == 2, errors
  line, = errors.splitlines()
  assert line.startswith("error: ") and "\\" not in line
  assert all(part in line for part in REFUSED[what][1]), line


def test_a_workdir_is_named_after_config_and_size(told):
  assert told["workdirs"] == ["runs/adamw-nano", "runs/adamw-0.3m", "runs/adamw-50m"]


def test_the_module_is_the_command_and_libraries_keep_quiet():
  # Unless it is told the platform, JAX says at level INFO which ones it looked for.
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  command = [sys.executable, "-m", "beyond_outliers.main", "--config=configs/adamw.py:nano,mesh.data=3,mesh.fsdp=7", "--dry_run"]
  process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
  assert (process.returncode, process.stdout) == (2, "")
  assert process.stderr.startswith("error: mesh = ") and process.stderr.count("\n") == 1, process.stderr
