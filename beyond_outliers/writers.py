"""What a run leaves in its workdir besides checkpoints: config, manifest, status, metrics; and where metrics go else."""
from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import importlib
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from beyond_outliers import config, mesh

Row = Mapping[str, Any]                           # {"step": n, metric: number}; None where it is not defined
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "ml-collections", "aqtp",
            "sentencepiece", "numpy")


class WorkdirError(RuntimeError):
  """A workdir that cannot be used for this run; the message says why and what to do."""


class Workdir:
  """The folder of one run. Files are replaced whole, so that a reader never sees half of one.

  Only process 0 of a run writes. A local or mounted folder. Errors: WorkdirError for the address of an object store."""

  def __init__(self, path: Any):
    if "://" in str(path):
      raise WorkdirError(f"workdir {path}: object stores cannot append to metrics.jsonl; give a mounted folder (gcsfuse, for gs://)")
    self.path = epath.Path(path).absolute()

  @property
  def checkpoints(self) -> epath.Path:
    return self.path / "checkpoints"

  def write(self, name: str, value: Any) -> None:
    if jax.process_index() == 0:
      self.path.mkdir(parents=True, exist_ok=True)
      temporary = self.path / f"{name}.{os.getpid()}.tmp"             # evaluation jobs may share a folder
      temporary.write_text(json.dumps(value, indent=2) + "\n")
      temporary.replace(self.path / name)

  def read(self, name: str) -> Any:
    """The JSON in a file, or None when it isn't there."""
    path = self.path / name
    return json.loads(path.read_text()) if path.exists() else None

  def set_status(self, status: str, step: int, reason: str = "") -> None:
    """status: running | done | diverged | preempted | failed."""
    self.write("status.json", {"status": status, "step": step, "reason": reason, "time": _now()})

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Holds the folder against other runs; the system lets go of it when the process ends, however it ends.

    Errors: WorkdirError on every process of the run when another one holds it."""
    with contextlib.ExitStack() as stack:
      problem = ""
      if jax.process_index() == 0:
        self.path.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(self.path / "lock", "a+"))
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          file.truncate(0)
          file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
          file.flush()
        except BlockingIOError:
          file.seek(0)
          problem = f"{self.path} is in use by {file.read() or 'another process'}; wait for it or give another --workdir"
      problem = mesh.from_first(problem)
      if problem:
        raise WorkdirError(problem)
      yield


def manifest(extra: Mapping[str, Any]) -> dict[str, Any]:
  """Where and with what a run was made: git commit, versions, devices, command."""
  return {
    "command": [os.path.basename(sys.executable), *sys.argv],
    "time": _now(),
    "host": socket.gethostname(),
    "git": _git(),
    "python": sys.version.split()[0],
    "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count(),
                "backend": jax.default_backend()},
    **extra,
  }


class Writer(Protocol):
  """Takes rows of metrics: {"step": n, name: number}."""

  def write(self, row: Row) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """metrics.jsonl: one object a row, flushed. Rows after `last_step` (of a run that is resumed) are dropped at opening."""

  def __init__(self, path: epath.Path, last_step: int):
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= last_step]
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
    self._file = path.open("a")

  def write(self, row: Row) -> None:
    # JSON knows no NaN and no infinity: a diverged loss is null.
    self._file.write(json.dumps({k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """Scalars for TensorBoard, through tensorboardX (extra: tensorboard). Those after `last_step` are dropped, if it is given."""

  def __init__(self, directory: epath.Path, last_step: int | None):
    tensorboardX = _optional("tensorboardX", "log.tensorboard", "tensorboard")
    self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=None if last_step is None else last_step + 1)

  def write(self, row: Row) -> None:
    for name, value in row.items():
      if name != "step" and value is not None:
        self._writer.add_scalar(name, value, row["step"])

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """Weights & Biases (extra: wandb); the run's id is kept in the workdir, so that a resumed run goes on in the same one."""

  def __init__(self, workdir: Workdir, project: str, settings: Mapping[str, Any]):
    wandb = _optional("wandb", "log.wandb", "wandb")
    known = workdir.read("wandb.json")
    self._run = wandb.init(project=project, name=workdir.path.name, config=dict(settings), dir=str(workdir.path),
                           id=known["id"] if known else None, resume="allow")
    workdir.write("wandb.json", {"id": self._run.id})

  def write(self, row: Row) -> None:
    self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

  def close(self) -> None:
    self._run.finish()


class Console:
  """Progress for a person: one line that is redrawn on a terminal, plain lines elsewhere."""

  def __init__(self, num_steps: int, file=None):
    self._steps, self._file = num_steps, file or sys.stderr
    self._redraw = self._file.isatty()
    self._open = False                                # whether the cursor stands behind a line to be redrawn

  def write(self, row: Row) -> None:
    if "eval/loss" in row:
      bits = f"{row['eval/bits_per_byte']:.4f} bits per byte · " if row["eval/bits_per_byte"] is not None else ""
      self.line(f"step {row['step']:>6} · validation loss {row['eval/loss']:.4f} ± {row['eval/loss_stderr']:.4f} nats · "
                f"perplexity {row['eval/perplexity']:.2f} · {bits}"
                f"{row['eval/documents']} documents, {row['eval/seconds']:.1f} s")
    elif "train/loss" in row:
      left = datetime.timedelta(seconds=round(row["seconds_left"]))
      text = (f"loss {row['train/loss']:.4f} · {row['tokens_per_second']:,.0f} tokens/s · "
              f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s ({row['peak_share']:.0%} of peak) · {left} left")
      if self._redraw:
        done = round(24 * row["step"] / self._steps)
        self._file.write(f"\r\x1b[K{'━' * done}{'─' * (24 - done)} {row['step']}/{self._steps} · {text}")
        self._file.flush()
        self._open = True
      else:
        self.line(f"step {row['step']:>6}/{self._steps} · {text}")

  def line(self, text: str) -> None:
    self._file.write(("\n" if self._open else "") + text + "\n")
    self._file.flush()
    self._open = False

  def close(self) -> None:
    if self._open:
      self._file.write("\n")
      self._open = False


def _optional(module: str, field: str, extra: str) -> Any:
  """A library that only an extra brings. Errors: ConfigError naming the field that asks for it."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise config.ConfigError(f"{field}: needs {module}; pip install 'beyond_outliers[{extra}]', or switch it off") from None


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git() -> dict[str, Any] | None:
  """The commit of the code that runs and whether it was changed since, or None outside a clone."""
  here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  try:
    ask = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
    commit = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
    if os.path.realpath(ask(["git", "rev-parse", "--show-toplevel"]).stdout.strip()) != os.path.realpath(here):
      return None                                     # installed inside somebody else's repository
    dirty = ask(["git", "status", "--porcelain", "--", "beyond_outliers", "configs"]).stdout
  except (OSError, subprocess.CalledProcessError):
    return None
  return {"commit": commit, "changed": bool(dirty.strip())}
