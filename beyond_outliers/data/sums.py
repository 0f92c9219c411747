"""SHA-256 sums of a prepared dataset: files are compared with meta.json's, the smallest as the
dataset is opened, the others behind the reading."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from beyond_outliers.config.sums import file_sha256
from beyond_outliers.data import description
from beyond_outliers.errors import DataError
from beyond_outliers.types import Json

AT_OPENING = 16 * 2**20  # bytes, of the smallest files: some hundredths of a second


class FileSums:
  """Files of a dataset's folder, each compared once with its SHA-256.

  described: {file: {bytes, sha256}}, as meta.json has it. A thread compares the files that `touch`
  names; a difference that was found is raised by every `check` that follows."""

  def __init__(self, directory: str, described: Json):
    self._folder, self._described = pathlib.Path(directory), described
    self._locks = {name: threading.Lock() for name in described}
    self._pending = set(described)
    self._touched: collections.deque[str] = collections.deque()
    self._working = threading.Lock()  # over what is touched, and the thread
    self._thread: threading.Thread | None = None
    self._problem = ""

  def __reduce__(self) -> Any:
    return FileSums, (str(self._folder), {name: self._described[name] for name in self._pending})

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
      if name in self._pending:
        self._compare(name)
        self.check()

  def touch(self, *names: str) -> None:
    """Has the thread compare these files: they are being read."""
    with self._working:
      self._touched += [name for name in names if name in self._pending]
      if self._touched and self._thread is None:
        thread = threading.Thread(target=self._work, name="sums", daemon=True)
        thread.start()  # first: whoever sees it may join it
        self._thread = thread

  def check(self) -> None:
    """Raises what is known by now. Errors: DataError."""
    if self._problem:
      raise DataError(self._problem)

  def wait(self) -> None:
    """Waits until all that was touched is compared. Errors: DataError."""
    if thread := self._thread:
      thread.join()
    self.check()

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
        name = self._touched.popleft()
      self._compare(name)

  def _compare(self, name: str) -> None:
    with self._locks[name]:  # nobody reads a file twice: who comes second waits
      if name not in self._pending:
        return
      problem = "contents are not those that were prepared (SHA-256 differs from meta.json's)"
      remedy = description.REMEDY
      try:
        if file_sha256(self._folder / name) == self._described[name]["sha256"]:
          self._pending.discard(name)
          return
      except OSError as error:
        problem = str(error.strerror)
        remedy = description.remedy_in(str(self._folder), error)
      self._problem = f"{self._folder / name}: {problem}; {remedy}"
