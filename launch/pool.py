"""A pool of jobs on this machine: a few at a time, each on its own share of the cores."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch import jobs

POLL_SECONDS = 0.1  # between two checks of what runs


@dataclasses.dataclass(eq=False)
class Task:
  """A job and its state."""

  job: jobs.Job
  restarts: int = 0  # how many are left
  over: bool = False  # ended for good, or will not be started
  code: int | None = None  # exit code; None if it has not ended since its last start
  slot: int | None = None  # while it runs
  began: float = 0.0
  processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)

  @property
  def running(self) -> bool:
    return self.slot is not None


class Pool:
  """Runs jobs, `parallel` at a time, and forwards signals that ask to stop.

  An evaluation beside its training shares the training's slot and cores. processes: per training;
  they meet on a free port. logs: folder for the jobs' output, "" to share the launcher's output.
  environment: variables for trainings, on top of this process's."""

  def __init__(
    self,
    listed: Sequence[jobs.Job],
    python: str,
    parallel: int = 1,
    processes: int = 1,
    restarts: int = 0,
    logs: str = "",
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
  ):
    self.tasks = [Task(job, restarts if job.kind == "train" else 0) for job in listed]
    self.asked = False  # whether it was asked to stop
    self.say = say
    self._named = {task.job.name: task for task in self.tasks}
    self._python, self._processes, self._logs = python, processes, logs
    self._environment = {**os.environ, **(environment or {})}
    self._shares = shares_of_cores(parallel)
    self._told: set[subprocess.Popen] = set()  # processes that were asked to stop

  def run(self, look: Callable[[], None] = lambda: None) -> None:
    """Runs until all jobs are over, or if asked to stop, those running. look: called regularly."""
    while True:
      for task in self.tasks:
        if task.running and all(p.poll() is not None for p in task.processes):
          self._ended(task)
      while not self.asked and self._start_next():
        pass
      look()
      if not any(task.running for task in self.tasks):
        return
      time.sleep(POLL_SECONDS)

  def hand_on(self, number: int, frame: Any) -> None:
    """Handler of a signal that asks to stop: forwards it to all processes."""
    self.asked = True
    for task in self.tasks:
      for process in task.processes:
        self._told.add(process)
        process.send_signal(number)

  def _start_next(self) -> bool:
    """Starts one job, or marks it as over; False if none is ready or no slot is free."""
    taken = {task.slot for task in self.tasks if task.running}
    free = [slot for slot in range(len(self._shares)) if slot not in taken]
    ready = [task for task in self.tasks if not (task.over or task.running) and self._may(task)]
    if not free or not ready:
      return False
    # Evaluations come before further trainings; a training's follower is started along with it.
    task = min(ready, key=lambda task: ("evaluate", "train", "report").index(task.job.kind))
    self._say_status(task)
    task.over = jobs.left_out(task.job)
    if not task.over:
      self._start(task, free[0])
    elif task.job.kind == "evaluate":
      self.say(f"{task.job.workdir}: is not evaluated, as it is neither done nor diverged")
    return True

  def _may(self, task: Task) -> bool:
    training = self._training(task)
    if training is not None:  # the training starts it
      return training.over
    return all(self._named[name].over for name in task.job.after)

  def _training(self, task: Task) -> Task | None:
    """The training that an evaluation follows beside it; None for other jobs."""
    if task.job.kind != "evaluate" or task.job.after:
      return None
    return next(t for t in self.tasks if (t.job.kind, t.job.workdir) == ("train", task.job.workdir))

  def _followers(self, training: Task) -> list[Task]:
    return [task for task in self.tasks if self._training(task) is training]

  def _say_status(self, task: Task) -> None:
    number = f"[{self.tasks.index(task) + 1}/{len(self.tasks)}]"
    self.say(f"{number} {describe(task.job)}")

  def _start(self, task: Task, slot: int) -> None:
    task.processes, task.slot, task.code = [], slot, None
    task.began = time.monotonic()
    environment = self._environment if task.job.kind == "train" else None
    with contextlib.ExitStack() as stack:
      stack.enter_context(on_cores(self._shares[slot]))
      output = self._log(task.job)
      if output is not None:
        stack.enter_context(output)
      for command in commands_of(task.job, self._python, self._processes):
        # In its own process group, it gets a terminal's Ctrl-C only from here, once, and has all
        # the time that it needs to save.
        process = subprocess.Popen(
          command, process_group=0, env=environment, stdout=output, stderr=output
        )
        task.processes.append(process)
        if self.asked and process not in self._told:  # asked while this one was being started
          process.terminate()
    for follower in self._followers(task):
      if not follower.running:
        follower.over = False
        self._say_status(follower)
        self._start(follower, slot)

  def _log(self, job: jobs.Job) -> Any:
    if not self._logs:
      return None
    os.makedirs(self._logs, exist_ok=True)
    return open(os.path.join(self._logs, f"{job.name}.txt"), "ab")

  def _ended(self, task: Task) -> None:
    slot, task.slot = task.slot, None
    task.code = code_of([process.returncode for process in task.processes])
    if task.code not in jobs.FINAL and task.restarts and not self.asked:
      command = shlex.join(commands_of(task.job, self._python)[0])
      self.say(f"exit code {task.code}: starting it again, {task.restarts} left: {command}")
      task.restarts -= 1
      self._start(task, slot or 0)
      return
    task.over = True
    if self._logs:
      self.say(f"{describe(task.job)} (exit code {task.code})")
    if jobs.status_of(task.job.workdir) not in (*jobs.ENDED, "failed"):
      for follower in self._followers(task):  # they would wait for more checkpoints
        for process in follower.processes:
          process.terminate()


def describe(job: jobs.Job) -> str:
  """A job in one line: its workdir, and the run's status or the kind of job."""
  what = {"evaluate": "evaluation", "report": "report"}.get(job.kind)
  return f"{job.workdir}: {what or jobs.status_of(job.workdir)}"


def well(task: Task) -> bool:
  """Whether a job that is over succeeded."""
  if task.job.kind == "train":
    return jobs.status_of(task.job.workdir) in jobs.ENDED
  return task.code in (0, None)


def commands_of(job: jobs.Job, python: str, processes: int = 1) -> list[list[str]]:
  """Commands of a job's processes; those of a training meet on a free port."""
  command = [python, "-m", job.module, *job.arguments]
  if processes == 1 or job.kind != "train":
    return [command]
  meeting = f"--distributed=127.0.0.1:{_free_port()},{processes},"
  return [[*command, meeting + str(index)] for index in range(processes)]


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def code_of(codes: Sequence[int]) -> int:
  """Exit code of a job, from those of its processes: a failed one's, if any failed."""
  return next((code for code in codes if code not in jobs.FINAL), max(codes))


def shares_of_cores(count: int) -> list[set[int]]:
  """Disjoint shares of the cores that this process may use, one for each of `count` jobs; empty
  sets, which stand for all cores, if there are fewer cores than jobs, or one job."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if count == 1 or len(cores) < count:
    return [set() for _ in range(count)]
  bounds = [i * len(cores) // count for i in range(count + 1)]
  return [set(cores[start:end]) for start, end in itertools.pairwise(bounds)]


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
  """Context in which started processes run only on these cores, from their first thread on."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def catch(handler: Callable[[int, Any], None], numbers: Sequence[signal.Signals]) -> None:
  """Sets the handler of signals, except those that this process ignores."""
  for number in numbers:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)
