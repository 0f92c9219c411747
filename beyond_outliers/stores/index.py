"""Index of a mirrored workdir: which files it has, and of which size and time.

The store has the index in an object of its own, written once all that it names is there: that
object is replaced whole, as no number of objects can be, and makes a checkpoint appear at once. The
folder keeps the index that it last wrote or read; a reader's copy one of the files of evaluation
jobs that it knows the store to have.

Files of evaluation jobs (`is_shared`) are in no index: any number of jobs write them, each file is
whole by itself, and what the store lists of them counts."""

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
# In a checkpoint that readers do not see; see checkpoint/retention.py.
TEMPORARY_STEP = re.compile(r"checkpoints/(\d+)/temporary/")
AT_ONCE = 8  # objects under way

Stamp = tuple[int, int]  # bytes, and nanoseconds of the last change


class Index(NamedTuple):
  """id: unlike that of every other writing. previous: the one that it took the place of."""

  id: str
  previous: str
  files: dict[str, Stamp]

  def after(self, files: dict[str, Stamp]) -> Index:
    return Index(secrets.token_hex(8), self.id, files)

  def encoded(self) -> bytes:
    return json.dumps(self._asdict(), indent=0).encode()


EMPTY = Index("", "", {})


def decode(content: bytes, where: str) -> Index:
  """Errors: WorkdirError for what is no index."""
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
  """The index that the folder last wrote or read; a damaged one counts as none."""
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
  """The checkpoint that a file belongs to, of those that are committed."""
  found = STEP.match(name)
  return int(found[1]) if found else None


def steps_named(names: Iterable[str]) -> set[int]:
  return {step for step in map(step_of, names) if step is not None}


def scan(folder: pathlib.Path) -> dict[str, Stamp]:
  """Stamps by name of all files but the lock, the index, temporaries and those of other runs, whose
  folders lie in this one where their addresses do.

  Errors: OSError of what cannot be listed, which must not pass for what is not there."""
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
  """Steps of the checkpoints that have their sums, and every file of these. Errors: OSError."""
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
  """Downloads files, with the times that they had; one that is gone by now is left out.

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
  """Does it of every name, some at once; returns the errors."""
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
