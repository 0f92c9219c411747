"""The commands as a person types them: a refusal is one line and exit code 2, before anything long
begins."""

import os
import subprocess
import sys

import commands
import pytest

# what is wrong -> (arguments of main, what its one line on stderr holds)
REFUSED = {
  "a size": (["--config=configs/adamw.py:50q"], ["size = '50q'", "50m"]),
  "a key of the argument": (
    ["--config=configs/adamw.py:nano,modle.heads=3"],
    ["modle: unknown key", "did you mean 'model'"],
  ),
  "a key of a flag": (
    ["--config=configs/adamw.py", "--config.model.hads=3"],
    ["unknown key 'hads'", "heads"],
  ),
  "a value of a flag": (
    ["--config=configs/adamw.py", "--config.steps=many"],
    ["config.steps=many"],
  ),
  "a value": (
    ["--config=configs/adamw.py", "--config.model.mlp=gelu"],
    ["model.mlp = 'gelu'", "'relu2', 'swiglu'"],
  ),
  "a mesh": (
    ["--config=configs/adamw.py:nano,mesh.data=3", "--dry_run"],
    ["mesh = ", "number of devices, 1"],
  ),
  "a flag": (["--config=configs/adamw.py", "--wrkdir=x"], ["'wrkdir'"]),
  "no config": ([], ["--config"]),
  "a file that is not there": (["--config=configs/nobody.py"], ["configs/nobody.py"]),
  "how to find the others": (
    ["--config=configs/adamw.py", "--distributed=here"],
    ["distributed", "HOST:PORT,COUNT,INDEX"],
  ),
}

# Flags parsed in the process that imported main.
DEFAULT_WORKDIRS = """
from absl import flags
from beyond_outliers import config

def default_workdir(argument):
  flags.FLAGS.unparse_flags()
  flags.FLAGS(["main", "--config=" + argument])
  return module.default_workdir(config.resolve(module.CONFIG.value))

result = [default_workdir(argument) for argument in
          ("configs/adamw.py", "configs/adamw.py:0.3m", "configs/adamw.py:50m,data.path=/a/b.c")]
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("refused") / "run"
  answers, workdirs = commands.answers(
    "main",
    [[*arguments, f"--workdir={workdir}"] for arguments, _ in REFUSED.values()],
    DEFAULT_WORKDIRS,
  )
  assert not workdir.exists(), "a refused command left a workdir"
  return {"workdirs": workdirs, "answers": dict(zip(REFUSED, answers, strict=True))}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_and_exit_code_2(told, what):
  code, errors = told["answers"][what]
  assert code == 2, errors
  (line,) = errors.splitlines()
  assert line.startswith("error: ") and "\\" not in line
  assert all(part in line for part in REFUSED[what][1]), line


def test_a_workdir_is_named_after_config_and_size(told):
  assert told["workdirs"] == ["runs/adamw-nano", "runs/adamw-0.3m", "runs/adamw-50m"]


def test_the_module_is_the_command_and_libraries_keep_quiet():
  # Unless it is told the platform, JAX says at level INFO which ones it looked for.
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  command = [
    sys.executable,
    "-m",
    "beyond_outliers.main",
    "--config=configs/adamw.py:nano,mesh.data=3,mesh.fsdp=7",
    "--dry_run",
  ]
  process = subprocess.run(
    command, cwd=commands.ROOT, env=environment, capture_output=True, text=True, timeout=120
  )
  assert (process.returncode, process.stdout) == (2, "")
  assert process.stderr.startswith("error: mesh = ") and process.stderr.count("\n") == 1, (
    process.stderr
  )
