"""Writers of a run's metrics: JSON lines, TensorBoard, Weights & Biases, the console."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from beyond_outliers.config.files import make_folder, standard_json
from beyond_outliers.config.sums import file_sha256, replaced
from beyond_outliers.errors import ConfigError, WorkdirError
from beyond_outliers.workdir import Workdir

Row = Mapping[str, Any]  # {"step": n, metric: number}; None if a metric is not defined
# Prefix of an evaluation's metrics -> what was evaluated, for people.
EVALUATIONS = {
  "eval": "",
  "eval/ema": "moving average: ",
  "eval/last": "mean of {checkpoints} checkpoints: ",
}


class Writer(Protocol):
  """Sink for rows of metrics."""

  def write(self, row: Row) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """metrics.jsonl: one object per row, flushed.

  On opening, drops rows after `last_step`, from which a run is resumed. Errors: WorkdirError."""

  def __init__(self, workdir: Workdir, last_step: int):
    path = workdir.path / "metrics.jsonl"
    kept = kept_rows(workdir, last_step)
    with replaced(path) as temporary:
      temporary.write_text(kept)
    self._file, self._sha256 = path.open("a"), hashlib.sha256(kept.encode())

  def write(self, row: Row) -> None:
    line = json.dumps(standard_json(row)) + "\n"  # a diverged loss is null
    self._sha256.update(line.encode())
    self._file.write(line)
    self._file.flush()

  def sha256(self) -> str:
    """SHA-256 of all rows so far, which are then on disk: after a power failure, a checkpoint still
    has its rows."""
    os.fsync(self._file.fileno())
    return self._sha256.hexdigest()

  def close(self) -> None:
    self._file.close()


def rows_sha256(sinks: Sequence[Writer]) -> str:
  """SHA-256 of the rows written so far; "" on processes that write none."""
  return "".join(sink.sha256() for sink in sinks if isinstance(sink, JsonLines))


def kept_rows(workdir: Workdir, last_step: int) -> str:
  """Lines of metrics.jsonl up to `last_step`. Errors: WorkdirError."""
  return "".join(line + "\n" for line, row in workdir.read_rows() if row["step"] <= last_step)


def check_rows(workdir: Workdir, step: int, sha256: str) -> bool:
  """Whether there are rows; refuses others than those with which checkpoint `step` was saved.

  Errors: WorkdirError."""
  path = workdir.path / "metrics.jsonl"
  if not path.exists():
    return False
  if hashlib.sha256(kept_rows(workdir, step).encode()).hexdigest() != sha256:
    raise WorkdirError(
      f"{path}: the rows up to step {step} are not those that were written (checkpoint {step} has "
      "their SHA-256); restore it from a copy, or move it away to go on without them"
    )
  return True


def check_last_rows(workdir: Workdir) -> None:
  """Refuses rows that are not those with which the run ended. Errors: WorkdirError."""
  path, rows = workdir.path / "metrics.jsonl", (workdir.read("status.json") or {}).get("rows")
  workdir.read_rows()  # raises if they cannot be read
  if rows not in (None, file_sha256(path)):
    raise WorkdirError(
      f"{path} was altered since it was written (status.json has another SHA-256); restore it from "
      "a copy, or remove the keys rows and sha256 there if that was on purpose"
    )


class TensorBoard:
  """Scalars for TensorBoard, through tensorboardX (extra: tensorboard).

  If `last_step` is given, scalars after it are dropped."""

  def __init__(self, directory: epath.Path, last_step: int | None):
    tensorboardX = _optional("tensorboardX", "log.tensorboard", "tensorboard")
    make_folder(directory, WorkdirError, "remove it, or set log.tensorboard = False")
    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=None if last_step is None else last_step + 1
    )

  def write(self, row: Row) -> None:
    for name, value in row.items():
      if name != "step" and value is not None:
        self._writer.add_scalar(name, value, row["step"])

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """Weights & Biases (extra: wandb).

  The W&B run's id is kept in the workdir, so that a resumed run continues in the same one. of: this
  training's id, from its manifest. Errors: WorkdirError if the workdir has another training's."""

  def __init__(self, workdir: Workdir, project: str, settings: Mapping[str, Any], of: str = ""):
    wandb = _optional("wandb", "log.wandb", "wandb")
    known = workdir.read("wandb.json")
    if known and known.get("of", of) != of:
      raise WorkdirError(
        f"{workdir.path / 'wandb.json'} is of another run; remove it to begin a new one there"
      )
    self._run = wandb.init(
      project=project,
      name=workdir.path.name,
      config=dict(settings),
      dir=str(workdir.path),
      id=known["id"] if known else None,
      resume="allow",
    )
    workdir.write("wandb.json", {"id": self._run.id, "of": of})

  def write(self, row: Row) -> None:
    self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

  def close(self) -> None:
    self._run.finish()


class Heartbeat:
  """status.json of a running run: its step, and the time, which shows that it is alive."""

  def __init__(self, workdir: Workdir, first: int):
    self._workdir, self._first = workdir, first

  def write(self, row: Row) -> None:
    self._workdir.beat(row["step"], self._first)

  def close(self) -> None:
    pass


class Console:
  """Progress for a person: a line that is redrawn on a terminal, plain lines elsewhere."""

  def __init__(self, num_steps: int, file=None):
    self._steps, self._file = num_steps, file or sys.stderr
    self._redraw = self._file.isatty()
    self._open = False  # whether the cursor is at the end of a line to be redrawn

  def write(self, row: Row) -> None:
    of = next((name for name in EVALUATIONS if f"{name}/loss" in row), None)
    if of is not None:
      found = {name.removeprefix(f"{of}/"): value for name, value in row.items()}
      bits = (
        f"{found['bits_per_byte']:.4f} bits per byte · "
        if found["bits_per_byte"] is not None
        else ""
      )
      self.line(
        f"step {row['step']:>6} · {EVALUATIONS[of].format(**found)}"
        f"validation loss {found['loss']:.4f} ± {found['loss_stderr']:.4f} nats · "
        f"perplexity {found['perplexity']:.2f} · {bits}"
        f"{found['documents']} documents, {found['seconds']:.1f} s"
      )
    elif "train/loss" in row:
      left = datetime.timedelta(seconds=round(row["seconds_left"]))
      text = (
        f"loss {row['train/loss']:.4f} · {row['tokens_per_second']:,.0f} tokens/s · "
        f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s ({row['peak_share']:.0%} of peak) · "
        f"{left} left"
      )
      if self._redraw:
        done = round(24 * row["step"] / self._steps)
        self._file.write(
          f"\r\x1b[K{'━' * done}{'─' * (24 - done)} {row['step']}/{self._steps} · {text}"
        )
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
  """A library that an extra installs. Errors: ConfigError naming the field that needs it."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise ConfigError(
      f"{field}: needs {module}; pip install 'beyond_outliers[{extra}]', or switch it off"
    ) from None
