"""Index of a mirrored workdir: its files, with their sizes and times.

In the store the index is one object, written after everything that it lists has been uploaded. One
object, unlike several, is replaced atomically, so a checkpoint appears all at once. A run's folder
keeps the index that it last wrote or read; a reader's copy keeps an index of the evaluation jobs'
files that it knows to be in the store.

Files of evaluation jobs (`is_shared`) are not in the store's index: any number of jobs write them,
each file is complete in itself, and the store's own listing counts."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

from beyond_outliers.config import sums
from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores.store import Store

INDEX, LEASE = "mirror.json", "lease.json"
SHARED = ("eval", "tensorboard/eval")
STEP = re.compile(r"checkpoints/(\d+)/")
# A file of a temporary checkpoint, which readers do not see (checkpoint/retention.py).
TEMPORARY_STEP = re.compile(r"checkpoints/(\d+)/temporary/")
AT_ONCE = 8  # objects transferred at a time

Stamp = tuple[int, int]  # (bytes, time of the last change in nanoseconds)


class Index(NamedTuple):
  """id: unique to this version of the index. previous: the id of the version that it replaced."""

  id: str
  previous: str
  files: dict[str, Stamp]

  def after(self, files: dict[str, Stamp]) -> Index:
    return Index(secrets.token_hex(8), self.id, files)

  def encoded(self) -> bytes:
    return json.dumps(self._asdict(), indent=0).encode()


EMPTY = Index("", "", {})


def decode(content: bytes, where: str) -> Index:
  """The Index in `content`. Errors: WorkdirError if it is none. where: for the message."""
  try:
    found = json.loads(content)
    files = {str(name): (int(size), int(time)) for name, (size, time) in found["files"].items()}
    if not all(map(sums.stays_inside, files)):
      raise ValueError("it names files outside of the workdir")
    return Index(str(found["id"]), str(found["previous"]), files)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise WorkdirError(
      f"{where} is not the index that was written ({error}); restore an older version of it"
    ) from None


def read(store: Store) -> tuple[Index, str | None]:
  """(the store's index, its tag), or (EMPTY, None)."""
  found = store.read(INDEX)
  return (decode(found[0], f"{store.address}/{INDEX}"), found[1]) if found else (EMPTY, None)


def in_store(store: Store) -> Index:
  return read(store)[0]


def last_of(folder: pathlib.Path) -> Index:
  """The index that the folder last wrote or read; EMPTY if there is none or it is damaged."""
  try:
    return decode((folder / INDEX).read_bytes(), str(folder / INDEX))
  except (FileNotFoundError, WorkdirError):
    return EMPTY


def keep(folder: pathlib.Path, index: Index) -> None:
  with sums.replaced(folder / INDEX) as temporary:
    temporary.write_bytes(index.encoded())


def is_shared(name: str) -> bool:
  return name.startswith(tuple(f"{folder}/" for folder in SHARED))


def step_of(name: str) -> int | None:
  """The step of the committed checkpoint that a file belongs to, or None."""
  found = STEP.match(name)
  return int(found[1]) if found else None


def steps_named(names: Iterable[str]) -> set[int]:
  return {step for step in map(step_of, names) if step is not None}


def scan(folder: pathlib.Path) -> dict[str, Stamp]:
  """Stamps, by name, of all files except the lock, the index, temporary files and those of other
  runs, whose folders are inside this one if their addresses are.

  Errors: OSError if a folder cannot be listed: its files must not be taken for missing."""
  found: dict[str, Stamp] = {}
  for base, folders, files in os.walk(folder, onerror=_raise_but_missing):
    if INDEX in files and pathlib.Path(base) != folder:
      folders.clear()
      continue
    folders[:] = [name for name in folders if not _is_temporary(name)]
    for name in files:
      path = pathlib.Path(base, name)
      if not _is_temporary(name) and path not in (folder / "lock", folder / INDEX):
        try:
          status = path.stat()
        except FileNotFoundError:  # deleted since, or a link to nothing
          continue
        found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
  return found


def whole_steps(folder: pathlib.Path, found: dict[str, Stamp]) -> set[int]:
  """Steps of the checkpoints that have their sums, and all files in these. Errors: OSError."""
  return {step for step in steps_named(found) if _is_whole(folder, step, found)}


def _raise_but_missing(error: OSError) -> None:
  if not isinstance(error, FileNotFoundError):  # deleted since
    raise error


def _is_temporary(name: str) -> bool:
  return name.endswith(".tmp") or ".orbax-checkpoint-tmp" in name or name.startswith(".fetching-")


def _is_whole(folder: pathlib.Path, step: int, found: dict[str, Stamp]) -> bool:
  try:
    named = json.loads((folder / f"checkpoints/{step}" / sums.SUMS).read_bytes())
  except (FileNotFoundError, ValueError):
    return False
  return isinstance(named, dict) and all(f"checkpoints/{step}/{name}" in found for name in named)


def fetch(store: Store, folder: pathlib.Path, files: dict[str, Stamp]) -> None:
  """Downloads files and sets their modification times to `files`; skips those gone by now.

  Errors: OSError."""

  def fetch_one(name: str) -> None:
    path = folder / name
    with sums.replaced(_made(path), durable=False) as temporary:
      store.download(name, temporary)
      os.utime(temporary, ns=(files[name][1], files[name][1]))

  for error in attempts(fetch_one, files).values():
    if not isinstance(error, FileNotFoundError):
      raise error


def attempts(do: Callable[[str], None], names: Iterable[str]) -> dict[str, OSError]:
  """Calls `do` for every name, several at a time; returns the errors by name."""
  failed: dict[str, OSError] = {}

  def attempt(name: str) -> None:
    try:
      do(name)
    except OSError as error:
      failed[name] = error

  with concurrent.futures.ThreadPoolExecutor(AT_ONCE, "store") as pool:
    list(pool.map(attempt, names))
  return failed


def _made(path: pathlib.Path) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  return path
