"""XManager launcher: a sweep as one XManager experiment, locally, on Vertex AI or on Kubernetes.

  python -m launch.xm_launch --config=configs/shampoo.py --root=runs/tuning/shampoo --parallel=2 \
    --evaluate=behind

On this machine, runs are processes of this environment, --parallel at a time; the cloud gets an
image built from launch/Dockerfile, or --image. XManager records what was launched in ~/.xmanager,
and has its own flags (--xm_...).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging

from beyond_outliers import cli
from beyond_outliers.config.checks import require_once
from beyond_outliers.errors import ConfigError
from launch import jobs, remote
from launch.jobs import Job

try:
  import psutil
  from xmanager import xm, xm_local
except ModuleNotFoundError as missing:
  print(
    f"error: {missing.name}: is not installed; pip install -c constraints.txt -e '.[launch]'",
    file=sys.stderr,
  )
  sys.exit(2)

# Accelerators for which the executors of XManager 0.8.5 ask for a machine or node that exists.
# Others they drop (TPUs on Kubernetes), or ask for on the wrong machine (an H100 on an N1).
ACCELERATORS = {
  "local": (),
  "vertex": ("p4", "t4", "p100", "v100", "a100", "l4_24th", "tpu_v2", "tpu_v3"),
  "kubernetes": ("p4", "t4", "p100", "v100", "a100"),
}
SIZES = {"cpu": 1, "ram": 2**30}  # in cores and GiB


def define_flags() -> None:
  jobs.define_flags()
  remote.define_image(required=False)
  flags.DEFINE_enum("executor", "local", list(ACCELERATORS), "Where the jobs run.")
  flags.DEFINE_integer("parallel", 1, "Jobs at a time, where they run here.", 1)
  flags.DEFINE_list(
    "requirements",
    [],
    "Resources of each job in the cloud, as XManager names them: a100=8,cpu=96,ram=680.",
  )


def parse_requirements(words: Sequence[str], executor: str) -> dict[str, float]:
  """{name of a resource: amount} from a100=8,ram=680. Errors: ConfigError."""
  allowed = (*ACCELERATORS[executor], *SIZES) if executor != "local" else ()
  require_once("--requirements", [word.partition("=")[0] for word in words])
  found: dict[str, float] = {}
  for word in words:
    name, _, amount = word.partition("=")
    if name not in allowed:
      remedy = f"of {', '.join(allowed)}" if allowed else "none for jobs that run here"
      raise ConfigError(
        f"--requirements={word}: expected for --executor={executor} {remedy}; for others use "
        "python -m launch.gke or launch.tpu"
      )
    if not re.fullmatch(r"[1-9]\d{0,5}", amount):
      raise ConfigError(f"--requirements={word}: expected a number, such as {name}=8")
    found[name] = int(amount) * SIZES.get(name, 1)
  if len(found.keys() - SIZES) > 1:
    raise ConfigError(f"--requirements={','.join(words)}: give one kind of accelerator per job")
  return found


def executor_of(name: str, requirements: dict[str, float]) -> xm.Executor:
  if name == "local":
    return xm_local.Local(experimental_stream_output=True)
  resources = {xm.ResourceType[name]: amount for name, amount in requirements.items()}
  make = {"vertex": xm_local.Vertex, "kubernetes": xm_local.Kubernetes}[name]
  return make(requirements=xm.JobRequirements(resources))


def program_of(executor: xm.Executor, image: str) -> xm.Packageable:
  """What the jobs run: this Python, or an image, built from this clone if none is given."""
  spec = type(executor).Spec()
  if isinstance(executor, xm_local.Local):
    return xm.Packageable(executable_spec=xm.Binary(path=sys.executable), executor_spec=spec)
  made = xm.Dockerfile(path=str(remote.ROOT), dockerfile=str(remote.ROOT / "launch/Dockerfile"))
  program = xm.Container(image_path=image) if image else made
  return xm.Packageable(executable_spec=program, executor_spec=spec)


def xm_job(job: Job, program: xm.Executable, executor: xm.Executor) -> xm.Job:
  """A job for XManager; the image's entry point is `python -m`."""
  words = [job.module, *job.arguments]
  if isinstance(executor, xm_local.Local):
    words.insert(0, "-m")
  elif isinstance(executor, xm_local.Kubernetes):
    words = [word.replace("$", "$$") for word in words]  # $(NAME) would be expanded
  return xm.Job(program, executor, name=job.name, args=words)


@dataclasses.dataclass
class Queue:
  """Starts the jobs of a list in an experiment, each after those that it waits for have ended.

  XManager starts all jobs that it is given at once, so it is given at most `parallel` at a time."""

  listed: Sequence[Job]
  parallel: int
  skip: Callable[[Job], bool]  # called for each job when its turn comes
  asked: bool = False  # whether it was asked to stop
  failed: list[Job] = dataclasses.field(default_factory=list)
  _told: set[int] = dataclasses.field(default_factory=set)  # ids of processes asked to stop

  async def run(self, experiment: Any, make: Callable[[Job], xm.Job]) -> None:
    free = asyncio.Semaphore(self.parallel)
    ended = {job.name: asyncio.Event() for job in self.listed}

    async def one(number: int, job: Job) -> None:
      for name in job.after:
        await ended[name].wait()
      async with free:
        if not self.asked and not self.skip(job):
          print(f"[{number}/{len(self.listed)}] {job.name}: {job.workdir}", flush=True)
          try:
            unit = await experiment.add(make(job))
            await unit.wait_until_complete()
          except xm.ExperimentUnitError:
            self.failed.append(job)
      ended[job.name].set()

    await asyncio.gather(*(one(number, job) for number, job in enumerate(self.listed, 1)))

  def stop(self) -> None:
    """Asks the local processes to save and starts no more; called again, it ends them at once. A
    terminal's Ctrl-C does not reach them, and XManager itself would only end their shells."""
    self._told.clear()
    if not self.asked:
      self.asked = True
      self._tell()

  def _tell(self) -> None:
    """Asks each process once; repeats, to catch those that are just being started."""
    for process in _running():
      if process.pid not in self._told:
        self._told.add(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
          process.send_signal(signal.SIGTERM)
    asyncio.get_running_loop().call_later(1, self._tell)


def _running() -> Iterator[psutil.Process]:
  """The jobs' own processes: children of the shells that XManager starts, or the shells themselves
  if they were replaced by what they run."""
  for child in psutil.Process().children():
    with contextlib.suppress(psutil.NoSuchProcess):
      yield from child.children() if child.cmdline()[1:2] == ["-c"] else [child]


async def run(queue: Queue, title: str, executor: xm.Executor, image: str) -> None:
  """Runs the experiment until its last job has ended."""
  loop = asyncio.get_running_loop()
  here = isinstance(executor, xm_local.Local)
  for number in cli.STOP_SIGNALS if here else ():
    loop.add_signal_handler(number, queue.stop)
  try:
    async with xm_local.create_experiment(experiment_title=title) as experiment:
      (program,) = experiment.package([program_of(executor, image)])
      await queue.run(experiment, lambda job: xm_job(job, program, executor))
      if queue.failed:  # on exit, XManager raises each failure again and logs its own tracebacks
        logging.set_verbosity(logging.FATAL)
  except RuntimeError:
    if not queue.failed:
      raise


def launch(argv: list[str]) -> None:
  """Runs those runs of the sweep that have not ended. Exits with 1 if one is neither done nor
  diverged, and with 42 if it was asked to stop."""
  del argv
  given = flags.FLAGS
  requirements = parse_requirements(given.requirements, given.executor)
  local = given.executor == "local"
  if local and given.image:
    raise ConfigError(f"--image={given.image}: jobs that run here need none; leave it out")
  if local and given.evaluate == "beside":
    raise ConfigError(
      "--evaluate=beside: would wait forever for a run that was refused; give --evaluate=behind, "
      "or use python -m launch.local"
    )
  if given.image:
    remote.check_image(given.image)
  if not local:
    remote.check_files(given.config, given.root)
  listed = jobs.of_flags(here=local)
  if given.dry_run:
    for job in listed:
      behind = f"  (behind {', '.join(job.after)})" if job.after else ""
      print(f"{job.name}: {shlex.join(remote.command(job))}{behind}")
    return
  executor = executor_of(given.executor, requirements)
  parallel = given.parallel if local else len(listed)
  queue = Queue(listed, parallel, jobs.left_out if local else lambda job: False)
  asyncio.run(run(queue, jobs.title(given.config, given.root), executor, given.image))
  if queue.asked:
    print("asked to stop; the same command resumes", flush=True)
    sys.exit(jobs.STOPPED)
  failed = [
    job for job in queue.failed if not (local and job.kind == "train" and jobs.left_out(job))
  ]
  if failed:
    sys.exit("not done: " + ", ".join(f"{job.name} ({job.workdir})" for job in failed))


if __name__ == "__main__":
  define_flags()
  cli.run_command(launch)
