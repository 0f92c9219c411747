"""The commands as a person types them: a refusal is one line and exit code 2, before anything long
begins."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import commands
import pytest
from absl import flags

from beyond_outliers import cli, stores
from beyond_outliers.errors import Failure
from beyond_outliers.evaluate import results

# what is wrong -> (arguments of main, what its one line on stderr holds)
REFUSED = {
  "a size": (["--config=configs/adamw.py:50q"], ["size = '50q'", "50m"]),
  "a key of the argument": (
    ["--config=configs/adamw.py:nano,modle.heads=3"],
    ["modle: unknown key", "did you mean 'model'"],
  ),
  "a size that is none of the colon's": (
    ["--config=configs/adamw.py:nano,size=50m"],
    ["size = '50m': give the size after the colon, as in --config=configs/adamw.py:50m"],
  ),
  "a size by a flag": (["--config=configs/adamw.py", "--config.size=50m"], ["after the colon"]),
  "a key twice": (
    ["--config=configs/adamw.py:nano,steps=3,steps=4"],
    ["config argument = 'steps': is given twice"],
  ),
  "a config twice": (
    ["--config=configs/adamw.py", "--config=configs/muon.py"],
    ["--config is given 2 times: give it once"],
  ),
  "a config twice, with a key": (
    ["--config=configs/adamw.py", "--config=configs/muon.py", "--config.steps=3"],
    ["--config is given more than once: give it once"],
  ),
  "a key's flag twice": (
    ["--config=configs/adamw.py", "--config.steps=3", "--config.steps=4"],
    ["--config.steps is given 2 times: give it once"],
  ),
  "a folder twice": (  # the test gives one, too
    ["--config=configs/adamw.py", "--workdir", "x"],
    ["--workdir is given 2 times: give it once"],
  ),
  "a switch and its opposite": (
    ["--config=configs/adamw.py", "--dry_run", "--nodry_run"],
    ["--dry_run is given 2 times: give it once"],
  ),
  "tokens that no steps follow": (
    ["--config=configs/adamw.py", "--config.tokens_per_parameter=50"],
    ["tokens_per_parameter = 50: steps = 260 is set"],
  ),
  "steps of another model": (
    ["--config=configs/adamw.py:0.1m", "--config.model.tied=False"],
    ["model.tied = False: tokens_per_parameter gives the steps for True only; set steps"],
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
  "a home that nobody has": (["--config=~nouser/adamw.py"], ["--config=~nouser", "home folder"]),
  "a home in a key that nobody has": (
    ["--config=configs/adamw.py", "--config.data.path=~nouser/x"],
    ["data.path = '~nouser/x'", "home folder"],
  ),
  "a config file at home": (["--config=~/nobody.py"], ["/nobody.py: there is no such file"]),
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


@pytest.mark.parametrize(
  "error, code, line",
  [
    (Failure("2-none.json: No space left on device"), 1, "error: 2-none.json: No space left on"),
    (KeyboardInterrupt(), 130, "stopped"),
  ],
)
def test_a_failure_and_ctrl_c_are_one_line(error, code, line, capsys, monkeypatch):
  """Of a full disk no traceback says more."""

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(cli.app, "run", fail)
  with pytest.raises(SystemExit) as ended:
    cli.run_command(print)
  (said,) = capsys.readouterr().err.splitlines()
  assert ended.value.code == code and said.startswith(line)
  assert issubclass(results.WriteError, Failure) and issubclass(stores.StoreError, Failure)


@pytest.mark.parametrize("module, flag", [("evaluate", "--workdir=none"), ("bench", "--loop=nano")])
def test_settings_of_jax_that_no_program_is_written_for_are_refused(module, flag):
  """As in a training (tests/train/test_run.py)."""
  refused = commands.run(f"beyond_outliers.{module}", flag, JAX_DISABLE_JIT="1")
  assert refused.returncode == 2, refused.stderr
  (line,) = refused.stderr.splitlines()
  assert line.startswith("error: jax_disable_jit = True: ")


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


def test_a_flag_that_is_a_path_knows_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", "/home/ada")
  values = flags.FlagValues()
  one = cli.path_flag("one", "", "", flag_values=values)
  some = cli.paths_flag("some", None, "", flag_values=values)
  values(["command", "--one=~/a[1],~", "--some=~/a,b/~,~"])
  assert one.value == "/home/ada/a[1],~" and some.value == ["/home/ada/a", "b/~", "/home/ada"]
  monkeypatch.chdir(tmp_path)
  (tmp_path / "lr=1,seed=0").mkdir()
  values(["command", "--some=lr=1,seed=0"])
  assert some.value == ["lr=1,seed=0"], "a folder whose name has a comma"
  with pytest.raises(flags.IllegalFlagValueError, match="--one=~nouser: ~ is not a home"):
    values(["command", "--one=~nouser"])


def test_a_flag_that_is_made_to_be_repeated_is_not_given_again():
  values = flags.FlagValues()
  flags.DEFINE_multi_string("each", [], "", flag_values=values)
  flags.DEFINE_string("one", "", "", flag_values=values)
  values(["command", "--each=a", "--each=b", "--one=a"])
  assert cli.given_again(values) == ""
  values(["command", "--one=b"])
  assert cli.given_again(values) == "--one is given 2 times: give it once"


def test_every_flag_that_is_a_path_is_one_of_those():
  """By its help: it names a folder, a file or a directory."""
  kinds = r"DEFINE_(string|list|config_file)$|\.paths?_flag$"
  root, calls = pathlib.Path(cli.__file__).parents[1], []
  for path in [*root.glob("beyond_outliers/**/*.py"), *root.glob("launch/*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and re.search(kinds, ast.unparse(node.func)):
        text = " ".join(ast.unparse(argument) for argument in node.args)
        if re.search(r"\b([Ff]olders?|[Ff]iles?|directory|One checkpoint)\b", text):
          calls.append(ast.unparse(node.func))
  assert calls.count("config_flags.DEFINE_config_file") == 1 and len(calls) >= 16
  assert set(calls) == {"cli.path_flag", "cli.paths_flag", "config_flags.DEFINE_config_file"}


def test_a_command_takes_huge_pages_once_and_where_linux_leaves_them_to_it(monkeypatch, tmp_path):
  started = []
  monkeypatch.setattr(cli, "HUGE_PAGES", tmp_path / "enabled")
  monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
  command = [sys.executable, "-m", "beyond_outliers.main", "--dry_run"]
  monkeypatch.setattr(sys, "orig_argv", command)
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
  cli.take_huge_pages()  # no such file: another system
  for mode in ("[always] madvise never", "always madvise [never]", "always [madvise] never"):
    assert not started
    cli.HUGE_PAGES.write_text(mode)
    cli.take_huge_pages()
  assert started == [command]
  assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
  cli.take_huge_pages()
  monkeypatch.delenv("GLIBC_TUNABLES")
  monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", "a program of somebody else's"])
  cli.take_huge_pages()
  assert started == [command]
