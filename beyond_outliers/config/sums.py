"""SHA-256 sums of a folder's files and of JSON objects, and atomic replacement of files.

A folder's sums are in `sha256.json`, {file: sum}, which other programs' readers ignore. A JSON
object with a file of its own contains its own sum."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from beyond_outliers.errors import ConfigError, remedy_for
from beyond_outliers.types import Json, PathLike

SUMS = "sha256.json"
UNFINISHED = re.compile(r".+\.\d+-\d+\.tmp")  # temporary names of `replaced`, by process and thread
OWN_SUM = "sha256"  # key of an object's own sum


def digest(value: Any) -> str:
  """SHA-256 of a value of JSON's types, whatever the order of keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_without(value: Json, *keys: str) -> str:
  return digest({key: each for key, each in value.items() if key not in keys})


def sealed(value: Mapping[str, Any]) -> Json:
  """The object with its own sum added, which `unsealed` checks and removes."""
  plain = json.loads(json.dumps(value))  # numbers as keys become text, and sort differently
  plain.pop(OWN_SUM, None)
  return {**plain, OWN_SUM: digest(plain)}


def unsealed(value: Json) -> tuple[Json, str]:
  """(the object without its own sum, what is wrong or ""); older objects have no sum."""
  # The sum comes last: if that matches under another name, the name was altered.
  name = OWN_SUM if OWN_SUM in value else next(reversed(value), OWN_SUM)
  plain = {key: each for key, each in value.items() if key != name}
  holds = value.get(name) == digest(plain)
  if name == OWN_SUM and (holds or value.get(name) is None):
    return plain, ""
  if name != OWN_SUM and not holds:
    return value, ""
  return plain, (
    f"was altered since it was written (its own SHA-256 differs; remove the key {OWN_SUM} if that "
    "was on purpose)"
  )


def file_sha256(path: Any) -> str:
  """SHA-256 of a file. path: a pathlib.Path, or one like it."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def package_sha256() -> str:
  """SHA-256 of all modules of this package, as installed on this machine."""
  package = pathlib.Path(__file__).parents[1]
  modules = sorted(package.rglob("*.py"))
  return digest({str(module.relative_to(package)): file_sha256(module) for module in modules})


def stays_inside(name: Any) -> bool:
  """Whether a name read from a file stays in the folder it is relative to, or below."""
  path = pathlib.PurePosixPath(name) if isinstance(name, str) else pathlib.PurePosixPath("/")
  return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def write_folder_sums(folder: PathLike, sums: Mapping[str, str]) -> None:
  with replaced(pathlib.Path(folder) / SUMS) as temporary:
    temporary.write_text(json.dumps(sums, indent=1) + "\n")


def folder_mismatch(folder: Any, files: Collection[str] | None = None) -> str:
  """The first difference of a folder's files from its sums; empty if there is none, or no sums.

  folder: a pathlib.Path, or one like it. files: check only these; all by default.
  """
  try:
    sums = json.loads((folder / SUMS).read_bytes())
  except FileNotFoundError:
    return ""
  except (ValueError, RecursionError, IsADirectoryError):
    sums = None
  if not isinstance(sums, dict) or not sums or not all(map(stays_inside, sums)):
    return f"{SUMS} is not readable"
  for name, expected in sums.items():
    if files is not None and name not in files:
      continue
    if not (folder / name).is_file():
      return f"{name} is missing"
    if file_sha256(folder / name) != expected:
      return f"{name} does not match its SHA-256 sum"
  return ""


def files_below(folder: Any) -> list[str]:
  """Relative paths of all files of a folder except its sums. folder: as `folder_mismatch`."""
  found, pending = [], [folder]
  while pending:
    for entry in pending.pop().iterdir():
      if entry.is_dir():
        pending.append(entry)
      elif not entry.name.startswith(SUMS):
        found.append(str(entry.relative_to(folder)))
  return sorted(found)


def check_folder(folder: pathlib.Path, files: Collection[str] | None = None) -> None:
  """Refuses a model's files, all by default, if they differ from their sums, which this program
  writes next to them. Errors: ConfigError."""
  remedy = f"fetch the whole model again, or remove {SUMS} if it was changed on purpose"
  try:
    problem = folder_mismatch(folder, files)
  except OSError as error:
    problem, remedy = f"{error.filename}: {error.strerror}", remedy_for(error, remedy)
  if problem:
    raise ConfigError(f"{folder}: {problem}; {remedy}")


@contextlib.contextmanager
def replaced(file: PathLike, durable: bool = True) -> Iterator[pathlib.Path]:
  """A temporary name to write a file under, which replaces the file on success. durable: only once
  it is on the disk, so that a power failure leaves the old file or the new one."""
  path = pathlib.Path(file)
  temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
  try:
    yield temporary
    if durable:
      _on_disk(temporary)
    temporary.replace(path)
    if durable:
      with contextlib.suppress(OSError):  # file systems like SMB cannot sync a folder
        _on_disk(path.parent)
  except BaseException:
    with contextlib.suppress(OSError):  # if nothing can be written, nothing may be removable either
      temporary.unlink(missing_ok=True)
    raise


def remove_stale(folder: Any) -> None:
  """Removes temporary files of `replaced` that killed writers left in a folder, and no others;
  nobody may be writing there. A folder that cannot be listed is left alone.

  folder: as `folder_mismatch`."""
  try:
    found = list(folder.iterdir())
  except OSError:
    return
  for path in found:
    if UNFINISHED.fullmatch(path.name):
      path.unlink(missing_ok=True)


def _on_disk(path: pathlib.Path) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)
