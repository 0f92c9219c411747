"""Two processes of one command that were started differently, or find different things in places of
the same name: each says so in one line, and nothing is done."""

import os
import pathlib
import subprocess
import sys

import commands
import pytest

from beyond_outliers import train

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {"model.blocks": 1, "steps": 2, "checkpoint.every": 1, "eval.every": 2}
pytestmark = pytest.mark.slow


def pair(module, flags, own=((), ()), folders=(ROOT, ROOT), variables=({}, {})):
  """(exit code, what it said) of two processes with common flags and their own."""
  meeting = f"--distributed=127.0.0.1:{commands.free_port()},2,"
  started = [
    subprocess.Popen(
      [sys.executable, "-m", f"beyond_outliers.{module}", *flags, *own[i], f"{meeting}{i}"],
      cwd=folders[i],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={**os.environ, "PYTHONPATH": str(ROOT), **variables[i]},
    )
    for i in range(2)
  ]
  try:
    said = [process.communicate(timeout=400)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def assert_told(ended, reason):
  for code, said in ended:
    assert code == 2 and reason in said.splitlines()[-1] and "Traceback" not in said, said


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
  """Workdirs of two runs, which differ in their seed."""
  workdirs = [tmp_path_factory.mktemp("runs") / str(seed) for seed in range(2)]
  for seed, workdir in enumerate(workdirs):
    train.run(tiny_config(**SETTINGS, seed=seed), workdir)
  return workdirs


@pytest.fixture
def command(tiny):
  return [f"--config={ROOT}/configs/adamw.py:{tiny(**SETTINGS)}"]


def test_flags_that_one_of_two_has_are_refused(command, trained):
  """Otherwise each would wait for the other forever, at different checkpoints."""
  flags = [*command, f"--workdir={trained[0]}"]
  before = sorted(trained[0].rglob("*"))
  assert_told(pair("main", flags, own=([], ["--from_step=1"])), "--from_step: None on process 0, 1")
  assert_told(pair("main", flags, own=(["--dry_run"], [])), "--dry_run: True on process 0, False")
  assert sorted(trained[0].rglob("*")) == before


def test_flags_of_the_compiler_that_one_of_two_has_are_refused(command, tmp_path):
  """Replicas would drift apart."""
  variables = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
  ended = pair("main", [*command, f"--workdir={tmp_path}"], variables=({}, variables))
  assert_told(ended, "on process 0, '--xla_cpu_enable_fast_math=true' on process 1")


def test_code_that_one_of_two_has_is_refused(command, tmp_path):
  """Both clones were changed since their commit, in another way."""
  other = "from beyond_outliers.config import sums; sums.package_sha256 = lambda: 'other'"
  (tmp_path / "sitecustomize.py").write_text(other)
  variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
  ended = pair("main", [*command, f"--workdir={tmp_path / 'run'}"], variables=({}, variables))
  assert_told(ended, "sources: ")


@pytest.mark.skipif(not pathlib.Path("/proc/self/cwd").exists(), reason="Linux has it")
def test_a_workdir_that_is_not_the_same_folder_is_refused(command, tmp_path):
  """As on disks of two hosts: the one would wait for ever for what the other wrote."""
  folders = [tmp_path / "0", tmp_path / "1"]
  for folder in folders:
    folder.mkdir()
  ended = pair("main", [*command, "--workdir=/proc/self/cwd/run"], folders=folders)
  assert_told(ended, "is not the same folder on all processes")
  assert [path.name for path in folders[0].rglob("*")] == ["run", "lock"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/cwd").exists(), reason="Linux has it")
def test_a_warm_start_from_another_run_on_each_is_refused(command, trained, tmp_path):
  folders = [tmp_path / "0", tmp_path / "1"]
  for folder, run in zip(folders, trained, strict=True):
    folder.mkdir()
    (folder / "from").symlink_to(run)
  flags = [*command, "--config.warm_start=/proc/self/cwd/from", f"--workdir={tmp_path / 'run'}"]
  assert_told(pair("main", flags, folders=folders), "warm_start = '/proc/self/cwd/from': ")


def test_evaluations_that_were_started_unlike_are_refused(trained):
  """Otherwise a result is written of rows of two models, or two texts."""
  flags = ["--recipes=rtn_w4a4"]
  of_two = [f"--workdir={trained[0]}"], [f"--workdir={trained[1]}"]
  assert_told(pair("evaluate", flags, own=of_two), "the model of --workdir")
  flags.append(of_two[0][0])
  ended = pair("evaluate", flags, own=([], ["--documents=1"]))
  assert_told(ended, "--documents: None on process 0, 1 on process 1")
  assert not (trained[0] / "eval").exists()
