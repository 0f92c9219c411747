"""Folder of one run: configuration, manifest, status, lock, and the SHA-256 sums of checkpoints."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from beyond_outliers import mesh
from beyond_outliers.errors import WorkdirError
from beyond_outliers.types import Json, PathLike

SUMS = "sha256.json"  # of a checkpoint: {file: its SHA-256}

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "tensorflow-datasets",
  "ml-collections",
  "aqtp",
  "sentencepiece",
  "numpy",
)


class Workdir:
  """Folder of one run, local or mounted. Files are replaced whole: a reader never sees half of one.

  Only process 0 of a run writes. Errors: WorkdirError for the address of an object store."""

  def __init__(self, path: PathLike):
    if "://" in str(path):
      raise WorkdirError(
        f"workdir {path}: object stores cannot append to metrics.jsonl; give a mounted folder "
        "(gcsfuse, for gs://)"
      )
    self.path = epath.Path(path).absolute()

  @property
  def checkpoints(self) -> epath.Path:
    return self.path / "checkpoints"

  def write(self, name: str, value: Any) -> None:
    if jax.process_index() == 0:
      self.path.mkdir(parents=True, exist_ok=True)
      temporary = self.path / f"{name}.{os.getpid()}.tmp"  # evaluation jobs may share a folder
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
    """Holds the folder against other runs, until the context or the process ends, however it ends.

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
          problem = (
            f"{self.path} is in use by {file.read() or 'another process'}; wait for it or give "
            "another --workdir"
          )
      problem = mesh.from_first(problem)
      if problem:
        raise WorkdirError(problem)
      yield


def manifest(extra: Mapping[str, Any]) -> Json:
  """Provenance of a run: git commit, versions, devices, command, time and host; then `extra`."""
  return {
    "command": [os.path.basename(sys.executable), *sys.argv],
    "time": _now(),
    "host": socket.gethostname(),
    "git": _git(),
    "python": sys.version.split()[0],
    "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    "devices": {
      "kind": jax.devices()[0].device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
      "backend": jax.default_backend(),
    },
    **extra,
  }


def standard_json(value: Any) -> Any:
  """What the JSON of other programs knows: null in the place of NaN and infinity, numbers for
  numpy's scalars. For results; a configuration's infinity is one."""
  if isinstance(value, Mapping):
    return {key: standard_json(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [standard_json(each) for each in value]
  if isinstance(value, np.generic):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: Any) -> str:
  """SHA-256 of a value of JSON's types, of its keys in any order."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sums(directory: epath.Path) -> None:
  """Seals a checkpoint: the SHA-256 of every file in the directory goes into its SUMS."""
  sums = {name: _sha256(directory / name) for name in files_below(directory)}
  temporary = directory / (SUMS + ".tmp")
  temporary.write_text(json.dumps(sums, indent=1))
  temporary.rename(directory / SUMS)


def mismatch(directory: epath.Path) -> str:
  """The first difference of a directory's files from its SUMS, or nothing."""
  try:
    sums = json.loads((directory / SUMS).read_text())
  except ValueError:
    return f"{SUMS} is not readable"
  files = set(files_below(directory))
  for name, expected in sums.items():
    if name not in files:
      return f"{name} is missing"
    if _sha256(directory / name) != expected:
      return f"{name} does not match its SHA-256 sum"
  return ""


def files_below(directory: epath.Path) -> list[str]:
  """Relative paths of all files but the sums."""
  found, pending = [], [directory]
  while pending:
    for entry in pending.pop().iterdir():
      if entry.is_dir():
        pending.append(entry)
      elif entry.name not in (SUMS, SUMS + ".tmp"):
        found.append(str(entry.relative_to(directory)))
  return sorted(found)


def _sha256(path: epath.Path) -> str:
  with path.open("rb") as file:
    # pyrefly: ignore[bad-argument-type]  (etils says only IO; it is a file like any)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git() -> Json | None:
  """The commit of the code that runs and whether it was changed since, or None outside a clone."""
  here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  try:
    ask = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
    commit = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
    root = ask(["git", "rev-parse", "--show-toplevel"]).stdout.strip()
    if os.path.realpath(root) != os.path.realpath(here):
      return None  # installed inside somebody else's repository
    dirty = ask(["git", "status", "--porcelain", "--", "beyond_outliers", "configs"]).stdout
  except (OSError, subprocess.CalledProcessError):
    return None
  return {"commit": commit, "changed": bool(dirty.strip())}
