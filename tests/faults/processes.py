"""Real training processes of small runs, and a run's final outcome.

A process is forked from one that has imported the program, as in tests/commands.py, and trains
through the command's own `main`; its steps take a while, so that there are moments between them.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import random
import re
import resource
import signal
import socket
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax._src import compiler, distributed

from beyond_outliers import cli, hardware
from beyond_outliers.train import loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY, KEEP = 24, 6, 3
STEP_SECONDS = 0.05
PATIENCE = 900.0  # seconds, after which a process counts as hanging
SETTINGS = {
  "model.blocks": 1,
  "model.heads": 6,
  "model.d_head": 8,
  "context": 32,
  "batch_size": 4,
  "steps": STEPS,
  "checkpoint.every": EVERY,
  "checkpoint.keep": KEEP,
  "eval.every": STEPS,
  "log.every": 1,
  "log.quant_statistics": False,
  "data.source": "text",
  "data.tokenizer": "bytes",
  "data.vocab": 264,
  "data.validation": "newest:2",
  "data.readers": 2,
  "max_skipped_updates": 3,
  "distributed.heartbeat_seconds": 30,
  "distributed.initialization_seconds": 60,
}
# Values in a row of metrics that depend on the machine, not on the training.
OF_THE_MACHINE = ("second", "flops", "peak", "memory")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
  [__name__, "beyond_outliers.mesh.processes", "beyond_outliers.checkpoint"]
)


class Kind(NamedTuple):
  """What is trained, in how many processes."""

  config: str
  processes: int
  settings: dict[str, object]

  @property
  def name(self) -> str:
    return f"{self.config}, {self.processes} process{'es' if self.processes > 1 else ''}"


KINDS = [
  Kind(config, count, {**settings, **({"mesh.fsdp": 2} if count > 1 else {})})
  for count in (1, 2)
  for config, settings in {
    "adamw": {},
    "shampoo": {"data.reader": "tfds"},
    "psgd": {},
    "shampoo_qat": {},
  }.items()
]


class Illness(NamedTuple):
  """What a process suffers from within; 0: not."""

  file_bytes: int = 0  # no file may be longer, as on a full disk
  descriptors: int = 0  # no more may be open
  nan_step: int = 0  # a moment of the optimizer gets a NaN in front of this step
  leaf: float = 0.0  # which of these arrays, as a fraction of them


class Process:
  """A process that trains, with what it says in the file `log`."""

  def __init__(self, arguments: list[str], log: pathlib.Path, illness: Illness | None = None):
    self._log = log
    log.touch()
    _serve()
    self._process = _context.Process(target=_train, args=(arguments, str(log), illness))
    self._process.start()

  def said(self) -> str:
    return self._log.read_text(errors="replace")

  def code(self) -> int | None:
    return self._process.exitcode

  def send(self, number: int) -> None:
    if self.code() is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._process.pid, number)

  def wait(self, seconds: float = PATIENCE) -> int:
    self._process.join(seconds)
    if self._process.exitcode is None:
      self.send(signal.SIGKILL)
      self._process.join()
      raise AssertionError(f"hangs for {seconds:.0f} s: {self.said()[-2000:]}")
    return self._process.exitcode


def _serve() -> None:
  """Starts what the processes are forked from, with this program and no other of the name."""
  before = os.environ.get("PYTHONPATH")
  os.environ["PYTHONPATH"] = str(ROOT)
  try:
    multiprocessing.forkserver.ensure_running()
  finally:
    os.environ.pop("PYTHONPATH")
    os.environ.update({} if before is None else {"PYTHONPATH": before})


def _train(arguments: list[str], log: str, illness: Illness | None) -> None:
  file = os.open(log, os.O_WRONLY | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  os.chdir(ROOT)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # though the suite be started by nohup
  hardware.measure_matmul = lambda dtype: 1e12  # a second of work, of which no number is compared
  compiler._cache_write = _write_of_every_process
  fit = loop.fit

  def slow_fit(step_fn, state, batches, hooks, num_steps):
    first = int(state.step)
    numbers = itertools.count(first + 1)

    def slow_step(state, batch):
      time.sleep(STEP_SECONDS)
      if illness and next(numbers) == illness.nan_step:
        state = _with_nan(state, illness.leaf)
      return step_fn(state, batch)

    return fit(slow_step, state, batches, hooks, num_steps)

  loop.fit = slow_fit
  if illness and illness.file_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (illness.file_bytes, illness.file_bytes))
  if illness and illness.descriptors:
    resource.setrlimit(resource.RLIMIT_NOFILE, (illness.descriptors, illness.descriptors))
  from beyond_outliers import main  # whose flags are not those of others that the tests import

  sys.argv = ["main", *arguments]
  try:
    cli.run_command(main.main)
  finally:
    atexit._run_exitfuncs()  # which a forked process leaves out


_write = compiler._cache_write


def _write_of_every_process(*compiled):
  """Lets every process write to the cache of compiled programs: JAX only lets process 0, under
  names that on CPUs are those of a single process."""
  state = distributed.global_state
  number, state.process_id = state.process_id, 0
  try:
    _write(*compiled)
  finally:
    state.process_id = number


def _with_nan(state, fraction):
  named, structure = jax.tree_util.tree_flatten_with_path(state.opt_state)
  leaves = [leaf for _, leaf in named]
  moments = [
    i
    for i, (path, leaf) in enumerate(named)
    if leaf.size and re.search(r"moment|\b[mn]u\b", jax.tree_util.keystr(path))
  ]
  chosen = moments[int(fraction * len(moments))]
  spoil = jax.jit(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), out_shardings=leaves[chosen].sharding)
  leaves[chosen] = spoil(leaves[chosen])
  return state._replace(opt_state=structure.unflatten(leaves))


def write_corpus(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  words = ("the", "of", "and", "to", "in", "a", "that", "it", "is", "was", "for", "on", "with")
  for i in range(12):
    text = " ".join(draw.choice(words) for _ in range(draw.randint(40, 160)))
    (folder / f"{i:02d}.txt").write_text(f"{text}.\n")


def start(
  kind: Kind,
  workdir: pathlib.Path,
  logs: pathlib.Path,
  *flags: str,
  corpus: pathlib.Path,
  datasets: pathlib.Path,
  illnesses: dict[int, Illness] | None = None,
  **changed: object,
) -> list[Process]:
  """All processes of a run. illnesses: by index of a process."""
  settings = {
    **SETTINGS,
    "data.path": f"{corpus}/*.txt",
    "data.directory": datasets,
    **kind.settings,
    **changed,
  }
  argument = ",".join(["nano", *(f"{key}={value}" for key, value in settings.items())])
  command = [f"--config=configs/{kind.config}.py:{argument}", f"--workdir={workdir}", *flags]
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  logs.mkdir(parents=True, exist_ok=True)
  number = len(list(logs.iterdir()))
  return [
    Process(
      [*command, *([f"--distributed={address},{kind.processes},{i}"] * (kind.processes > 1))],
      logs / f"{number:02d}-{i}.txt",
      (illnesses or {}).get(i),
    )
    for i in range(kind.processes)
  ]


def until(condition, processes: list[Process], seconds: float = PATIENCE) -> bool:
  """Whether it came to be while all of them ran."""
  deadline = time.monotonic() + seconds
  while not condition():
    if any(process.code() is not None for process in processes):
      return condition()
    assert time.monotonic() < deadline, f"waits in vain: {processes[0].said()[-2000:]}"
    time.sleep(0.01)
  return True


def rows(workdir: pathlib.Path) -> list[dict]:
  """Rows of metrics.jsonl, but for lines that are none."""
  path, found = workdir / "metrics.jsonl", []
  for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return found


def last_row(workdir: pathlib.Path) -> int:
  return max((row["step"] for row in rows(workdir) if isinstance(row, dict)), default=0)


def steps(workdir: pathlib.Path) -> list[int]:
  """Committed checkpoints, oldest first."""
  folder = workdir / "checkpoints"
  found = folder.iterdir() if folder.exists() else []
  return sorted(int(path.name) for path in found if path.name.isdigit())


def status(workdir: pathlib.Path) -> dict:
  path = workdir / "status.json"
  return json.loads(path.read_text()) if path.exists() else {"status": "", "step": 0, "reason": ""}


def outcome(workdir: pathlib.Path, behind: int = 0) -> dict:
  """Digests of the last step's state, position in the data, and rows behind a step, but for what
  they say of the machine. Read by Orbax alone."""
  last = workdir / "checkpoints" / str(STEPS)
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(last / "state").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = reader.restore(last / "state", restore_args=as_numpy)
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    array = np.asarray(leaf)
    described = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
    digest.update(described.encode() + array.tobytes())
  kept = [
    {name: value for name, value in row.items() if not any(word in name for word in OF_THE_MACHINE)}
    for row in rows(workdir)
    if row["step"] > behind
  ]
  return {
    "state": digest.hexdigest(),
    "data": json.loads((last / "data" / "metadata").read_text()),
    "rows": hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
  }
