"""XManager experiments: jobs in their order and so many at a time, with arguments as they are, and
accelerators that its executors do ask for."""

import asyncio
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from beyond_outliers.errors import ConfigError
from launch.jobs import Job

pytest.importorskip("xmanager", reason="the extra launch is not installed")

from xmanager import xm, xm_local, xm_mock

from launch import jobs, xm_launch

ROOT = pathlib.Path(__file__).parents[2]


def train(name, *arguments):
  return Job(f"train-{name}", "train", "beyond_outliers.main", arguments, f"runs/{name}")


def evaluation(name):
  module = "beyond_outliers.evaluate"
  return Job(f"eval-{name}", "evaluate", module, (), f"runs/{name}", (f"train-{name}",))


SWEEP = [train("a", "--x=1"), train("b"), train("c"), *map(evaluation, "abc")]


def submitted(listed, parallel, skip=lambda job: False, fails=()):
  """Names of the jobs in the order in which a mock experiment gets them, and the most that ran at
  once; each takes a moment, and those of `fails` fail."""
  names, running, most = [], set(), []

  async def wait(unit):
    name = unit._launched_jobs[-1].name
    running.add(name)
    most.append(len(running))
    await asyncio.sleep(0.01)
    running.discard(name)
    if name in fails:
      raise xm.ExperimentUnitFailedError(name)

  class Unit(xm_mock.MockExperimentUnit):
    async def _wait_until_complete(self):
      await wait(self)

  class Experiment(xm_mock.MockExperiment):
    def _create_experiment_unit(self, args, role=None, identity=""):
      future = asyncio.get_running_loop().create_future()
      jobs_of_it = []
      unit = Unit(
        self, self._work_unit_id_predictor, self._create_task, jobs_of_it, [], args, role, identity
      )
      names.append(jobs_of_it)
      future.set_result(unit)
      return future

  queue = xm_launch.Queue(listed, parallel, skip)

  async def run():
    async with Experiment() as experiment:
      executable, executor = xm_mock.MockExecutable(), xm_mock.MockExecutor()
      await queue.run(experiment, lambda job: xm_launch.xm_job(job, executable, executor))

  asyncio.run(run())
  return [jobs[0].name for jobs in names], max(most), queue


@pytest.mark.parametrize("parallel", [1, 2, 6])
def test_so_many_jobs_run_at_a_time_and_evaluations_behind_their_trainings(parallel):
  names, most, queue = submitted(SWEEP, parallel)
  assert sorted(names) == sorted(job.name for job in SWEEP) and not queue.failed
  assert most == min(parallel, 3)
  for name in "abc":
    assert names.index(f"train-{name}") < names.index(f"eval-{name}")


def test_a_job_that_fails_is_no_hindrance_to_those_behind_it():
  names, _, queue = submitted(SWEEP, 2, fails={"train-a"})
  assert len(names) == 6 and [job.name for job in queue.failed] == ["train-a"]


def test_what_ended_before_is_left_out_but_not_its_evaluation():
  names, _, _ = submitted(SWEEP, 2, skip=lambda job: job.name == "train-b")
  assert "train-b" not in names and "eval-b" in names


def test_a_run_that_has_ended_is_not_started_and_one_that_has_not_is_not_evaluated(tmp_path):
  job = Job("train-a", "train", "beyond_outliers.main", (), str(tmp_path))
  behind = Job("eval-a", "evaluate", "beyond_outliers.evaluate", (), str(tmp_path), ("train-a",))
  beside = Job("eval-b", "evaluate", "beyond_outliers.evaluate", (), str(tmp_path))
  for status, out in {"": 2, "failed": 2, "done": 1, "diverged": 1}.items():
    if status:
      (tmp_path / "status.json").write_text(json.dumps({"status": status}))
    assert [jobs.left_out(one) for one in (job, behind, beside)] == [*(out == 1, out == 2, False)]


HOSTILE = ["--x=$(id)", "`id`", "'", "a b", "$HOME", "$$", "\\", "line\nbreak", "*", "; exit 9"]


def written(executor):
  program = xm_mock.MockExecutable()
  made = xm_launch.xm_job(train("a", *HOSTILE), program, executor)
  return made.args.to_list(str)


@pytest.mark.slow
def test_arguments_are_the_modules():
  """Of this Python; the image's entry point is `python -m`; Kubernetes puts variables in."""
  assert written(xm_local.Local()) == ["-m", "beyond_outliers.main", *HOSTILE]
  assert written(xm_local.Vertex()) == ["beyond_outliers.main", *HOSTILE]
  escaped = written(xm_local.Kubernetes())
  assert [word.replace("$$", "$") for word in escaped] == ["beyond_outliers.main", *HOSTILE]
  assert all("$" not in word.replace("$$", "") for word in escaped)


def cloud_job(executor, requirements):
  found = xm_launch.parse_requirements(requirements, executor)
  return xm_launch.xm_job(
    train("a"), xm_mock.MockExecutable(), xm_launch.executor_of(executor, found)
  )


@pytest.mark.slow  # as all that import Google's libraries
@pytest.mark.parametrize("accelerator", xm_launch.ACCELERATORS["vertex"])
def test_vertex_gets_a_machine_that_has_the_accelerator(accelerator):
  """As XManager makes it, which knows no other machines than these."""
  vertex = pytest.importorskip("xmanager.cloud.vertex", reason="needs the extra 'launch'")
  spec = vertex.get_machine_spec(cloud_job("vertex", [f"{accelerator}=8"]))
  families = {"a100": "a2-", "l4_24th": "g2-", "tpu_v2": "cloud-tpu", "tpu_v3": "cloud-tpu"}
  assert spec["machine_type"].startswith(families.get(accelerator, "n1-"))
  assert spec["accelerator_count"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", xm_launch.ACCELERATORS["kubernetes"])
def test_kubernetes_gets_a_limit_and_a_label_of_its_nodes(accelerator):
  kubernetes = pytest.importorskip("xmanager.cloud.kubernetes", reason="needs the extra 'launch'")
  executor = cloud_job("kubernetes", [f"{accelerator}=2", "ram=16"]).executor
  limits = kubernetes.requirements_from_executor(executor).limits
  assert limits["nvidia.com/gpu"] == "2" and int(limits["memory"]) == 16 * 2**30
  label = kubernetes.node_selector_from_executor(executor)["cloud.google.com/gke-accelerator"]
  assert label == f"nvidia-tesla-{accelerator}"


REFUSED = {
  ("vertex", "h100=8"): "--requirements=h100=8: expected for --executor=vertex of p4",
  ("kubernetes", "tpu_v5e=4"): "others use python -m launch.gke",
  ("local", "v100=1"): "none for jobs that run here",
  ("vertex", "a100=0"): "--requirements=a100=0: expected a number, such as a100=8",
  ("vertex", "a100"): "--requirements=a100: expected a number",
  ("vertex", "a100=8;t4=1"): "one kind of accelerator per job",
  ("vertex", "a100=8;a100=1"): "--requirements = 'a100': is given twice",
}


@pytest.mark.parametrize("given", REFUSED)
def test_accelerators_that_an_executor_would_drop_are_refused(given):
  executor, words = given
  with pytest.raises(ConfigError) as refused:
    xm_launch.parse_requirements(words.split(";"), executor)
  assert REFUSED[given] in str(refused.value)


@pytest.mark.slow
def test_the_image_is_made_of_the_clone():
  spec = xm_launch.program_of(xm_local.Vertex(), "").executable_spec
  dockerfile = pathlib.Path(spec.dockerfile)
  assert pathlib.Path(spec.path) == ROOT and dockerfile == ROOT / "launch/Dockerfile"
  copied = [
    word
    for line in dockerfile.read_text().splitlines()
    if line.startswith("COPY ")
    for word in line.split()[1:-1]
  ]
  assert {"beyond_outliers", "configs", "constraints.txt", "setup.py"} <= set(copied)
  assert all((ROOT / word).exists() for word in copied)
  image = xm_launch.program_of(xm_local.Vertex(), "registry/x:1").executable_spec
  assert image == xm.Container(image_path="registry/x:1")


# A run of XManager's own local executor: this launcher, whose jobs are a module that stands for the
# trainer: notes when it starts, saves when it is asked to, and ends with its first argument's code.
STAND_IN = """
import pathlib, signal, sys, time
code, seconds, name = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
pathlib.Path(f"{name}.started").touch()
end = time.time() + seconds
while time.time() < end and not asked:
  time.sleep(0.01)
pathlib.Path(f"{name}.ended").write_text(" ".join(sys.argv))
sys.exit(42 if asked else code)
"""
PROGRAM = """
import asyncio, json, sys
from absl import flags
from launch import jobs, xm_launch
flags.FLAGS(["x"])
listed = [jobs.Job(*fields) for fields in json.loads(sys.argv[1])]
queue = xm_launch.Queue(listed, 2, lambda job: False)
asyncio.run(xm_launch.run(queue, "sweep", xm_launch.executor_of("local", {}), ""))
print(json.dumps([[job.name for job in queue.failed], queue.asked]))
"""


def started(folder, listed):
  (folder / "stand_in.py").write_text(STAND_IN)
  fields = [[*dataclasses.astuple(job)] for job in listed]
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, json.dumps(fields)],
    cwd=folder,
    env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def stand_in(name, code=0, seconds=0.0, after=(), more=()):
  arguments = (str(code), str(seconds), name, *more)
  return Job(name, "train", "stand_in", arguments, name, after)


@pytest.mark.slow
def test_its_local_executor_runs_them_and_says_what_failed(tmp_path):
  listed = [
    stand_in("train-a", more=HOSTILE),
    stand_in("train-b", code=2),
    stand_in("eval-a", after=("train-a",)),
    stand_in("eval-b", after=("train-b",)),
  ]
  process = started(tmp_path, listed)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  (result,) = [json.loads(line) for line in out.splitlines() if line.startswith("[[")]
  assert result == [["train-b"], False]
  assert "Traceback" not in err
  assert all((tmp_path / f"{job.name}.ended").exists() for job in listed)
  assert (tmp_path / "train-a.ended").read_text().endswith(" ".join(HOSTILE))


@pytest.mark.slow
def test_a_signal_reaches_the_runs_which_save_and_no_other_is_started(tmp_path):
  listed = [stand_in("train-a", seconds=200), stand_in("eval-a", after=("train-a",))]
  process = started(tmp_path, listed)
  try:
    while not (tmp_path / "train-a.started").exists():
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
  finally:
    process.kill()
  (result,) = [json.loads(line) for line in out.splitlines() if line.startswith("[[")]
  assert result == [["train-a"], True], err
  assert (tmp_path / "train-a.ended").exists() and not (tmp_path / "eval-a.started").exists()


REFUSED_FLAGS = {
  "--evaluate=beside": "--evaluate=beside: would wait forever",
  "--image=registry/x:1": "--image=registry/x:1: jobs that run here need none",
  "--executor=vertex": "--root={folder}: would be lost with the machine that writes there",
  "--requirements=a100=8": "--requirements=a100=8: expected for --executor=local none",
}


@pytest.mark.parametrize("given", REFUSED_FLAGS)
def test_a_refusal_is_one_line_before_anything_starts(tmp_path, given):
  result = subprocess.run(
    [
      *(sys.executable, "-m", "launch.xm_launch", "--config=configs/adamw.py"),
      *(f"--root={tmp_path}", "--dry_run", given),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
  assert result.stderr.startswith("error: ")
  assert REFUSED_FLAGS[given].format(folder=tmp_path) in result.stderr
