"""The folder of a run: configuration, manifest, status, lock, and SHA-256 sums of checkpoints."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import glob
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
from absl import logging
from etils import epath
from etils.epath import gpath

from beyond_outliers import config, mesh
from beyond_outliers.config import sums as file_sums
from beyond_outliers.config.files import is_elsewhere, make_folder, read_json
from beyond_outliers.config.sums import SUMS
from beyond_outliers.errors import WorkdirError, remedy_for
from beyond_outliers.mesh import jax_settings
from beyond_outliers.types import Json, PathLike

PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
  *("ml-collections", "aqtp", "sentencepiece", "numpy"),
)

# Values that a file must hold to be valid; DATA and PARAMETERS only where they are needed.
REQUIRED: dict[str, dict[str, Any]] = {
  "manifest.json": {"time": str},
  "status.json": {"status": str, "step": int},
  "wandb.json": {"id": str},
}
DATA = dict.fromkeys(("data.directory", "data.fingerprint", "data.tokenizer"), str)
PARAMETERS = dict.fromkeys(("parameters.total", "parameters.embedding"), int)
ASIDE = re.compile(r"aside-(\d+)-\d+")  # folder for what came after a step that a run went back to
OF_A_START = ("config", "resumed")  # keys of the manifest that change when a run is resumed
RESTORE = "restore it from a copy, or take another workdir"


class FolderPath(gpath.PosixGPath):
  """A path whose `glob` takes the path itself literally, so that only the pattern has wildcards.

  etils globs both together: Orbax, which looks for its files this way, would find none in
  `lr=[1e-3]`, and another folder's in `*`. Paths made from it by / have the property too."""

  def glob(self, pattern: str) -> Iterator[Self]:
    yield from map(type(self), epath.Path(glob.escape(str(self))).glob(pattern))


class Workdir:
  """The folder of a run, local or mounted. Files are replaced whole: no reader sees half of one.

  Only process 0 of a run writes. Errors: WorkdirError for the address of an object store."""

  def __init__(self, path: PathLike):
    found = FolderPath(os.path.abspath(os.path.expanduser(path)))
    if "://" in f"{path} {found}":  # etils also takes /gs for gs://
      raise WorkdirError(
        f"workdir {path}: is an address, and a folder is needed here; give a mounted folder that "
        "is not below /gs, /s3, /az or /hf (--workdir takes s3://BUCKET/PATH and gs://BUCKET/PATH)"
      )
    self.path = found
    self._held: int | None = None  # the folder's file descriptor while this process holds it

  @property
  def checkpoints(self) -> epath.Path:
    return self.path / "checkpoints"

  def write(self, name: str, value: Any, *, durable: bool = True) -> None:
    """Writes a value as JSON, on process 0 only. durable: as in `replaced`."""
    if jax.process_index() == 0:
      self._write(name, value, durable)

  def _write(self, name: str, value: Any, durable: bool = True) -> None:
    if self._held is not None and is_elsewhere(self._held, self.path):
      raise WorkdirError(
        f"{self.path} was moved or removed while its run was going on, and the run ends; give the "
        "same command once it is back"
      )
    self.path.mkdir(parents=True, exist_ok=True)
    with file_sums.replaced(self.path / name, durable) as temporary:
      temporary.write_text(json.dumps(file_sums.sealed(value), indent=2) + "\n")

  def read(self, name: str, kinds: Mapping[str, Any] | None = None) -> Any:
    """The JSON in a file, or None if there is no file. Errors: WorkdirError for a damaged file, or
    one without values of these `kinds`."""
    try:
      kinds = {**REQUIRED.get(name, {}), **(kinds or {})}
      return read_json(self.path / name, WorkdirError, RESTORE, kinds)
    except (FileNotFoundError, NotADirectoryError):
      return None

  def read_config(self, *, checked: bool = False) -> config.Config | None:
    """The configuration of the run, or None if there is no run. Errors: those of `read`.

    checked: also refuses one that is not the manifest's, as a start killed midway leaves it."""
    found = self.read("config.json")
    expected = (self.read("manifest.json") or {}).get("config") if checked else None
    if expected not in (None, file_sums.digest(found)):
      raise WorkdirError(f"{self.path / 'config.json'} does not match manifest.json; {RESTORE}")
    try:
      return None if found is None else config.resolve(found)
    except config.ConfigError as error:
      raise WorkdirError(f"{self.path / 'config.json'}: {error}; {RESTORE}") from None

  def read_rows(self) -> list[tuple[str, Json]]:
    """(line, row) of metrics.jsonl, without a last line that was cut off while being written.

    Errors: WorkdirError with the number of a line that holds no row."""
    path, found = self.path / "metrics.jsonl", []
    try:
      lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
      return []
    except OSError as error:
      raise WorkdirError(
        f"{path}: {error.strerror or error}; {remedy_for(error, RESTORE)}"
      ) from None
    for number, line in enumerate(lines, 1):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if isinstance(row, dict) and isinstance(row.get("step"), int):
        found.append((line.decode(), row))
      elif line and number < len(lines):
        raise WorkdirError(f"{path}:{number}: not a row of metrics, {line[:40]!r}; remove the line")
    return found

  def check(self) -> None:
    """Reads what a resumed run will need. Errors: those of `read` and `read_rows`."""
    self.read("manifest.json", DATA)
    self.read("wandb.json")
    self.read_rows()

  def check_past(self) -> None:
    """Refuses a run that has lost its checkpoints: it would begin anew, and drop its rows.

    Errors: WorkdirError."""
    status = self.read("status.json") or {"status": "", "step": 0}
    begun = status.get("first", status["step"])  # "first": where a running run began or resumed
    had = status["status"] in ("done", "preempted") or (begun and status["status"] != "diverged")
    if had or any(self.checkpoints.glob("damaged-*")):
      raise WorkdirError(
        f"{self.path} holds a run, {status['status']} at step {status['step']}, but none of its "
        "checkpoints; restore one from a copy, or start in another workdir"
      )

  def set_status(self, status: str, step: int, reason: str = "", rows: str = "") -> None:
    """status: running | done | diverged | preempted | failed. rows: SHA-256 of metrics.jsonl."""
    self.write("status.json", {**_status(status, step, reason), **({"rows": rows} if rows else {})})

  def beat(self, step: int, first: int, reason: str = "") -> None:
    """Writes that the run, begun at step `first`, is running, at this step and time."""
    self.write("status.json", {**_status("running", step, reason), "first": first}, durable=False)

  def set_failed(self, step: int, reason: str) -> None:
    """Writes status failed, from any process, since the first may be the one that is gone."""
    if (self.read("status.json") or {}).get("status") == "running":
      self._write("status.json", _status("failed", step, reason))

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Holds the folder against other runs until the context ends, or the process in whatever way.

    Errors: WorkdirError, on every process of the run, if another run holds it."""
    with contextlib.ExitStack() as stack:
      problem = ""
      if jax.process_index() == 0:
        try:
          make_folder(self.path, WorkdirError, "give another --workdir")
          stack.enter_context(self._locked())
        except WorkdirError as error:
          problem = str(error)
      problem = mesh.from_first(problem)
      if problem:
        raise WorkdirError(problem)
      yield

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    """`lock`, on the one process that takes it."""
    try:
      file = open(self.path / "lock", "a+")
    except OSError as error:
      remedy = remedy_for(error, "remove it, or give another --workdir")
      raise WorkdirError(f"{self.path / 'lock'}: {error.strerror or error}; {remedy}") from None
    with file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        raise WorkdirError(
          f"{self.path} is in use by {file.read() or 'another process'}; wait for it or give "
          "another --workdir"
        ) from None
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
      file.flush()
      self._held = os.open(self.path, os.O_RDONLY)
      try:
        yield
      finally:
        os.close(self._held)
        self._held = None


def _status(status: str, step: int, reason: str) -> Json:
  return {"status": status, "step": step, "reason": reason, "time": _now()}


def code() -> Json:
  """What results depend on: git commit, modules, versions, JAX's settings and compiler flags."""
  return {
    "git": _git(),
    "sources": file_sums.package_sha256(),
    "python": sys.version.split()[0],
    "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    "jax": jax_settings.deciding(),
    "compiler_flags": jax_settings.compiler_flags(),
  }


def manifest(extra: Mapping[str, Any]) -> Json:
  """Provenance of a run: command, time, host, `code` and devices; then `extra`."""
  return {
    "command": [os.path.basename(sys.executable), *sys.argv],
    "time": _now(),
    "host": socket.gethostname(),
    **code(),
    "devices": {
      "kind": jax.devices()[0].device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
      "backend": jax.default_backend(),
    },
    **extra,
  }


def identity_of(manifest: Json) -> str:
  """Digest of a training, from its manifest: unique to it, and unchanged when it is resumed."""
  known = manifest.get("identity")  # in a copy that is not the whole manifest
  return known or file_sums.digest_without(manifest, *OF_A_START)


def write_sums(directory: epath.Path) -> None:
  """Seals a checkpoint: writes the SHA-256 of every file in the directory to its SUMS."""
  names = file_sums.files_below(directory)
  sums = {name: file_sums.file_sha256(directory / name) for name in names}
  file_sums.write_folder_sums(directory, sums)


def mismatch(directory: epath.Path) -> str:
  """The first difference of a directory's files from its SUMS, or "", also if it has no SUMS."""
  found = file_sums.folder_mismatch(directory)  # first: it raises if something cannot be read
  if not (directory / SUMS).exists():
    logging.warning(
      "checkpoint %s has no %s (the run ended before it was written): not verified", directory, SUMS
    )
  return found


def stamps(directory: epath.Path) -> set[tuple[str, int, int]]:
  """(name, bytes, time in seconds) of a checkpoint's files; empty if they cannot be read."""
  try:
    found = [(name, (directory / name).stat()) for name in file_sums.files_below(directory)]
  except OSError:
    return set()
  return {(name, file.length, file.mtime) for name, file in found}


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git() -> Json | None:
  """The commit of the running code and whether it was changed since, or None outside a clone."""
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
