"""A sweep's jobs: names that every engine takes, commands, and what waits for what."""

import re

import pytest

from beyond_outliers.errors import ConfigError
from launch import jobs

# What people, and files of theirs, put into values.
HOSTILE = (
  "a b",
  "c,d",
  "[1, 2]",
  "it's",
  'say "x"',
  "$(touch x)",
  "`x`",
  "e;f",
  "-g",
  "H",
  "h\n",
  "é",
  "l" * 60,
)


def sweep_file(folder, values, key="data.path"):
  file = folder / "my sweep.py"
  file.write_text(f"def get_hyper(h):\n  return h.sweep({key!r}, {list(values)!r})\n")
  return str(file)


def test_jobs_of_a_sweep_wait_for_each_other(tmp_path):
  arguments = ("configs/soap.py:nano,steps=2", str(tmp_path), ["seed=0"])
  train, evaluate, report = jobs.describe(
    *arguments[:2],
    ["seed=0", "optimizer.learning_rate=0.003"],
    evaluate="behind",
    report=True,
    evaluate_flags=["--recipes=rtn_w4a4"],
  )
  workdir = f"{tmp_path}/learning_rate=0.003,seed=0"
  assert train == jobs.Job(
    "train-learning-rate-0-003-seed-0",
    "train",
    "beyond_outliers.main",
    (
      "--config=configs/soap.py:nano,steps=2",
      f"--workdir={workdir}",
      "--config.optimizer.learning_rate=0.003",
      "--config.seed=0",
    ),
    workdir,
  )
  assert evaluate == jobs.Job(
    "eval-learning-rate-0-003-seed-0",
    "evaluate",
    "beyond_outliers.evaluate",
    (f"--workdir={workdir}", "--recipes=rtn_w4a4"),
    workdir,
    (train.name,),
  )
  assert report.after == (train.name, evaluate.name) and report.workdir == str(tmp_path)
  beside = [job for job in jobs.describe(*arguments, evaluate="beside") if job.kind == "evaluate"]
  assert len(beside) == 6 and all(job.after == () and "--follow" in job.arguments for job in beside)
  assert {job.kind for job in jobs.describe(*arguments)} == {"train"}


@pytest.mark.parametrize("key", ["data.path", "UPPER.9", "9", "ü"])
def test_names_suit_every_engine_and_are_one_job_s(tmp_path, key):
  listed = jobs.describe(sweep_file(tmp_path, HOSTILE, key), "r", evaluate="behind", report=True)
  names = [job.name for job in listed]
  assert len(set(names)) == len(names) == 2 * len(HOSTILE) + 1
  for name in names:
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= jobs.NAME_LENGTH, name


def test_values_reach_the_command_as_they_are(tmp_path):
  listed = jobs.describe(sweep_file(tmp_path, HOSTILE), "r")
  assert [job.arguments[-1] for job in listed] == [f"--config.data.path={v}" for v in HOSTILE]
  assert len({job.workdir for job in listed}) == len(HOSTILE)


def test_names_do_not_depend_on_which_runs_are_chosen(tmp_path):
  file = sweep_file(tmp_path, ["x_y", "x-y"])  # one name, but for the digest
  names = [job.name for job in jobs.describe(file, "r")]
  assert len(set(names)) == 2
  assert [job.name for job in jobs.describe(file, "r", ["data.path='x-y'"])] == names[1:]


def test_two_runs_for_one_workdir_are_refused(tmp_path):
  """One of them was left out without a word."""
  with pytest.raises(ConfigError, match=r"two runs for the folder path=a_b: .*'a b'.*'a/b'"):
    jobs.describe(sweep_file(tmp_path, ["a b", "a/b"]), "r")
  assert len(jobs.describe(sweep_file(tmp_path, [1, 1]), "r")) == 1, "the same run twice is one"


def test_an_empty_sweep_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="no run of"):
    jobs.describe(sweep_file(tmp_path, []), "r")


@pytest.mark.parametrize("config", ["configs/soap_qat.py:50m", "9.py", "_.py", "/a b/Ü'.py"])
def test_a_sweep_has_a_title_of_its_own(config):
  one, other = (jobs.title(config, root) for root in ("runs/a", "runs/b"))
  assert one != other and re.fullmatch("[a-z][a-z0-9-]{0,28}[a-z0-9]", one), one
