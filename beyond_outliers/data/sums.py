"""SHA-256 sums of a prepared dataset: files are compared with meta.json's, the smallest as the
dataset is opened, the others behind the reading."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from beyond_outliers.config.sums import file_sha256
from beyond_outliers.data import description
from beyond_outliers.errors import DataError
from beyond_outliers.types import Json

AT_OPENING = 16 * 2**20  # bytes, of the smallest files: some hundredths of a second


class Stamp(NamedTuple):
  """Distinguishes a file from one that took its place. Some mounts give a new inode every time."""

  device: int
  inode: int
  size: int
  mtime_ns: int

  @classmethod
  def of(cls, found: os.stat_result) -> Stamp:
    return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class FileSums:
  """Files of a dataset's folder, each compared with its SHA-256 once, and again if another is found
  in its place, or if it was written to since.

  described: {file: {bytes, sha256}}, as meta.json has it. verified: those that were compared. A
  thread compares the files that `touch` and `opened` name; a difference that was found is raised by
  every `check` that follows."""

  def __init__(self, directory: str, described: Json, verified: Mapping[str, Stamp] | None = None):
    self.folder, self._described = pathlib.Path(directory), described
    self._locks = {name: threading.Lock() for name in described}
    self._verified = dict(verified or {})
    self._touched: collections.deque[tuple[str, Stamp | None]] = collections.deque()
    self._working = threading.Lock()  # over what is touched, and the thread
    self._thread: threading.Thread | None = None
    self._problem = ""

  def __reduce__(self) -> Any:
    return FileSums, (str(self.folder), self._described, dict(self._verified))

  def verify_smallest(self) -> None:
    """Errors: as `verify`."""
    left = AT_OPENING
    for name in sorted(self._described, key=lambda name: self._described[name]["bytes"]):
      left -= self._described[name]["bytes"]
      if left < 0:
        break
      self.verify([name])

  def verify(self, names: Iterable[str]) -> None:
    """Compares these files now. Errors: DataError naming the first that differs."""
    for name in names:
      self._forget_altered(name)
      if self._is_pending(name):
        self._compare(name)
        self.check()

  def touch(self, *names: str) -> None:
    """Has the thread compare these files: they are being read."""
    self._begin([(name, None) for name in names])

  def opened(self, name: str, stamp: Stamp) -> None:
    """As `touch`, of one that was just opened; one in the place of another that was compared is
    compared now. Errors: as `verify`."""
    if self._verified.get(name, stamp) != stamp:
      self._verified.pop(name, None)
      self._compare(name, stamp)
      self.check()
    self._begin([(name, stamp)])

  def _begin(self, opened: Iterable[tuple[str, Stamp | None]]) -> None:
    with self._working:
      self._touched += [each for each in opened if self._is_pending(each[0])]
      if self._touched and self._thread is None:
        thread = threading.Thread(target=self._work, name="sums", daemon=True)
        thread.start()  # first: whoever sees it may join it
        self._thread = thread

  def check(self) -> None:
    """Raises what is known by now. Errors: DataError."""
    if self._problem:
      raise DataError(self._problem)

  def wait(self) -> None:
    """Waits until all that was touched is compared, also what was altered since. Errors:
    DataError."""
    if thread := self._thread:
      thread.join()
    self.check()
    self.verify(list(self._verified))

  @contextlib.contextmanager
  def blamed(self) -> Iterator[None]:
    """Puts what is raised within down to a damaged file, if one was read. Errors: DataError."""
    try:
      yield
    except Exception:
      self.wait()
      raise

  def _work(self) -> None:
    while True:
      with self._working:
        if self._problem or not self._touched:
          self._thread = None
          return
        name, stamp = self._touched.popleft()
      self._compare(name, stamp)

  def _forget_altered(self, name: str) -> None:
    """Has a file compared again that was written to. One that took its place does not matter to
    those who have the old one open."""
    known = self._verified.get(name)
    with contextlib.suppress(OSError):
      now = Stamp.of(os.stat(self.folder / name))
      if known and now[:2] == known[:2] and now != known:
        self._verified.pop(name, None)

  def _is_pending(self, name: str) -> bool:
    return name in self._described and name not in self._verified

  def _compare(self, name: str, opened: Stamp | None = None) -> None:
    """opened: what is being read under this name."""
    with self._locks[name]:  # nobody reads a file twice: who comes second waits
      if not self._is_pending(name):
        return
      problem = "contents are not those that were prepared (SHA-256 differs from meta.json's)"
      remedy = description.REMEDY
      try:
        before = Stamp.of(os.stat(self.folder / name))
        if file_sha256(self.folder / name) == self._described[name]["sha256"]:
          after = Stamp.of(os.stat(self.folder / name))
          if before[2:] == after[2:] == (opened or after)[2:]:
            self._verified[name] = before
            return
          problem = "was replaced while it was read"
          remedy = "nothing is known to be damaged: give the same command"
      except OSError as error:
        problem = str(error.strerror)
        remedy = description.remedy_in(str(self.folder), error)
      self._problem = f"{self.folder / name}: {problem}; {remedy}"
