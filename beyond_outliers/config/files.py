"""Files and folders that a person names: a leading `~` in their paths, the JSON in them, whether
they are writable or locked; and results in standard JSON."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import reprlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from beyond_outliers.config.sums import unsealed
from beyond_outliers.errors import Refusal, remedy_for
from beyond_outliers.types import Json, PathLike


def expand_home(path: str) -> str:
  """The path with a leading `~` or `~name` replaced by the home folder.

  Errors: ValueError, with the remedy, if there is no such user."""
  found = os.path.expanduser(path)
  if found.startswith("~"):
    raise ValueError(
      "~ is not a home folder of any user here; give the full path, or ./~ for a file of that name"
    )
  return found


def read_json(
  path: PathLike, refusal: type[Refusal], remedy: str, kinds: Mapping[str, Any] | None = None
) -> Json:
  """The JSON object in a file, with values of these `kinds`; see `misfit`. Its own SHA-256 is
  checked and removed.

  Errors: FileNotFoundError, NotADirectoryError; `refusal` with the file, what is wrong with it, and
  the remedy, or that of `remedy_for` if it cannot be read at the moment."""
  try:
    with open(path, "rb") as file:
      value = json.loads(file.read())
  except (FileNotFoundError, NotADirectoryError):
    raise
  except OSError as error:
    remedy = remedy_for(error, remedy)
    raise refusal(f"{os.fspath(path)}: {error.strerror or error}; {remedy}") from None
  except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
    problem = f"is not the JSON that was written ({error})"
    raise refusal(f"{os.fspath(path)}: {problem}; {remedy}") from None
  problem = misfit(value, {})
  if not problem:
    value, problem = unsealed(value)
  if problem := problem or misfit(value, kinds or {}):
    raise refusal(f"{os.fspath(path)}: {problem}; {remedy}")
  return value


def folders_with(
  names: Sequence[str], root: PathLike, own: re.Pattern[str], refusal: type[Refusal]
) -> list[str]:
  """The folders at or below `root` that have files of all these names; each once, even if links
  lead to it. In a folder that has them, subfolders that match `own` are not searched.

  Errors: `refusal` for a folder that cannot be read."""
  found, seen, pending = [], set(), [os.path.abspath(os.path.expanduser(root))]
  while pending:
    folder = pending.pop()
    real = os.path.realpath(folder)
    if real in seen:
      continue
    seen.add(real)
    try:
      entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
      raise refusal(f"{folder}: {error.strerror}; give folders of runs that can be read") from None
    if {entry.name for entry in entries}.issuperset(names):
      found.append(folder)
      entries = [entry for entry in entries if not own.fullmatch(entry.name)]
    below = [entry for entry in entries if os.path.isdir(entry.path)]  # false for circular links
    # Links last, so that a folder is found by its own name.
    pending = [entry.path for entry in below if entry.is_symlink()] + pending
    pending += [entry.path for entry in below if not entry.is_symlink()]
  return found


def make_folder(path: PathLike, refusal: type[Refusal], remedy: str, field: str = "") -> None:
  """Makes a folder, unless it exists. field: the configuration field that names it, if any.

  Errors: `refusal` if it cannot be made, or nothing can be written into it."""
  try:
    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except OSError as error:
    folder = f"{field} = {os.fspath(path)!r}" if field else os.fspath(path)
    raise refusal(f"{folder}: {error.strerror or error}; {remedy}") from None


def cache_root() -> str:
  """Folder for copies of remote or packed files: BEYOND_OUTLIERS_CACHE, or in the user's cache."""
  users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  found = os.environ.get("BEYOND_OUTLIERS_CACHE") or os.path.join(users, "beyond_outliers")
  return os.path.abspath(found)


def is_locked(path: PathLike) -> bool:
  """Whether a process holds a file's lock; false if there is no such file."""
  try:
    with open(path, "rb") as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released as it is closed
  except BlockingIOError:
    return True
  except OSError:  # no such file, or a file system without locks
    return False
  return False


def is_elsewhere(opened: int, path: PathLike) -> bool:
  """Whether what was opened at a path is no longer there; false if that cannot be told now."""
  try:
    return not os.path.samestat(os.stat(path), os.fstat(opened))
  except (FileNotFoundError, NotADirectoryError):
    return True
  except OSError:
    return False


def misfit(value: Any, kinds: Mapping[str, Any]) -> str:
  """Why a value read from JSON is not an object with values of these `kinds`, {dotted key: type};
  empty if it is."""
  if not isinstance(value, dict):
    return f"is a JSON {type(value).__name__}, not an object"
  missing, wrong = [], []
  for key, kind in kinds.items():
    *above, last = key.split(".")
    node: Any = value
    for name in above:
      node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
      missing.append(key)
    elif not isinstance(node[last], kind):
      name = getattr(kind, "__name__", kind)
      wrong.append(f"{key} is {reprlib.repr(node[last])}, not of type {name}")
  return f"lacks {', '.join(missing)}" if missing else "".join(wrong[:1])


def standard_json(value: Any) -> Any:
  """A result in JSON that other programs can read: null for NaN and infinity, and plain numbers for
  numpy's scalars. (Not for configurations, whose infinity is read back.)"""
  if isinstance(value, Mapping):
    return {key: standard_json(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [standard_json(each) for each in value]
  if hasattr(value, "item"):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value
