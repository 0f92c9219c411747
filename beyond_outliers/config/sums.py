"""SHA-256 sums of a folder's files and of JSON objects, and files that are replaced whole.

A file `sha256.json` holds {file: sum}. Other programs' readers of a folder pass over it. An object
that is a file of its own holds its sum itself."""

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
UNFINISHED = re.compile(r".+\.\d+-\d+\.tmp")  # names of `replaced`: process and thread
OWN_SUM = "sha256"  # key of an object's own


def digest(value: Any) -> str:
  """SHA-256 of a value of JSON's types, of its keys in any order."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_without(value: Json, *keys: str) -> str:
  return digest({key: each for key, each in value.items() if key not in keys})


def sealed(value: Mapping[str, Any]) -> Json:
  """The object with its own sum, which `unsealed` takes out again."""
  plain = json.loads(json.dumps(value))  # a number that is a key becomes text, and sorts otherwise
  plain.pop(OWN_SUM, None)
  return {**plain, OWN_SUM: digest(plain)}


def unsealed(value: Json) -> tuple[Json, str]:
  """(the object without its own sum, what is wrong with it or nothing); older ones have none."""
  # The sum comes last: under another name it is one whose name was altered.
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
  """path: of the library pathlib, or of one like it."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def package_sha256() -> str:
  """Of all modules of this package, as they lie on this machine."""
  package = pathlib.Path(__file__).parents[1]
  modules = sorted(package.rglob("*.py"))
  return digest({str(module.relative_to(package)): file_sha256(module) for module in modules})


def stays_inside(name: Any) -> bool:
  """Whether a name that a file holds is of a file in the folder that it is about, or below it."""
  path = pathlib.PurePosixPath(name) if isinstance(name, str) else pathlib.PurePosixPath("/")
  return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def write_folder_sums(folder: PathLike, sums: Mapping[str, str]) -> None:
  with replaced(pathlib.Path(folder) / SUMS) as temporary:
    temporary.write_text(json.dumps(sums, indent=1) + "\n")


def folder_mismatch(folder: Any, files: Collection[str] | None = None) -> str:
  """The first difference of a folder's files from its sums, or nothing, also without any sums.

  folder: a path of the library pathlib, or of one like it. files: only these, where they have one.
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
  """Relative paths of all files of a folder but its sums. folder: as of `folder_mismatch`."""
  found, pending = [], [folder]
  while pending:
    for entry in pending.pop().iterdir():
      if entry.is_dir():
        pending.append(entry)
      elif not entry.name.startswith(SUMS):
        found.append(str(entry.relative_to(folder)))
  return sorted(found)


def check_folder(folder: pathlib.Path, files: Collection[str] | None = None) -> None:
  """Refusal of a model's files, all by default, that are not those that were written: where this
  program wrote them, their sums lie beside them. Errors: ConfigError."""
  remedy = f"fetch the whole model again, or remove {SUMS} if it was changed on purpose"
  try:
    problem = folder_mismatch(folder, files)
  except OSError as error:
    problem, remedy = f"{error.filename}: {error.strerror}", remedy_for(error, remedy)
  if problem:
    raise ConfigError(f"{folder}: {problem}; {remedy}")


@contextlib.contextmanager
def replaced(file: PathLike, durable: bool = True) -> Iterator[pathlib.Path]:
  """Another name to write a file under, which takes its place once it is whole; and, durable, on
  the disk, so that a power failure leaves the old or the new."""
  path = pathlib.Path(file)
  temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
  try:
    yield temporary
    if durable:
      _on_disk(temporary)
    temporary.replace(path)
    if durable:
      with contextlib.suppress(OSError):  # file systems like SMB have no such thing of a folder
        _on_disk(path.parent)
  except BaseException:
    with contextlib.suppress(OSError):  # where nothing can be written any more, nor removed
      temporary.unlink(missing_ok=True)
    raise


def remove_stale(folder: Any) -> None:
  """Removes what writers that were killed left of `replaced` in a folder, in which nobody may be
  writing; of others' files, none. One that cannot be listed is left to whoever will read it.

  folder: as of `folder_mismatch`."""
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
