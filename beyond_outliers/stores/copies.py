"""A reader's local copy of a run in a store: small files at once, checkpoints on request; and the
upload of files that evaluation jobs add to the copy."""

from __future__ import annotations

import pathlib
import shutil
import time

from absl import logging

from beyond_outliers.config import sums
from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores.index import (
  INDEX,
  TEMPORARY_STEP,
  Stamp,
  is_shared,
  step_of,
  steps_named,
)
from beyond_outliers.stores.retention import is_set_aside
from beyond_outliers.stores.store import Store, StoreError, cache_folder, open_store

REFRESH_SECONDS = 5.0  # within this time of a refresh, the store is not asked again


class Copy:
  """A copy of the run at an address, as it is now, in `folder`, which processes may share.

  Errors: WorkdirError on creation; OSError afterwards."""

  def __init__(self, address: str, store: Store | None = None, folder: pathlib.Path | None = None):
    self.address = address
    self._store = store or open_store(address)
    self.folder = folder or cache_folder("copies", address)
    self._index, self._looked = index_lib.EMPTY, -REFRESH_SECONDS
    self._told = False
    self._texts: dict[str, tuple[Stamp, bytes]] = {}  # cache of `read`
    try:
      self._refresh()
    except OSError as error:
      raise WorkdirError(str(error)) from None

  def refresh(self) -> None:
    """Fetches new files except checkpoints, and removes those that are gone from the store. If the
    store cannot be reached, warns once, and asks again the next time."""
    if time.monotonic() - self._looked < REFRESH_SECONDS:
      return
    try:
      self._refresh()
      self._told = False
    except StoreError as error:
      if not self._told:
        logging.warning("%s; what was read before is used until the store answers", error)
      self._told, self._looked = True, time.monotonic()

  def _refresh(self) -> None:
    published = index_lib.last_of(self.folder).files  # before the store is listed
    index = index_lib.in_store(self._store)
    have = index_lib.scan(self.folder)
    for step in steps_named(have) - self._steps_of(index):
      shutil.rmtree(self.folder / f"checkpoints/{step}", ignore_errors=True)
    small = {
      name: stamp
      for name, stamp in index.files.items()
      if step_of(name) is None and not is_set_aside(name)
    }
    for name in have:
      if name not in small and not is_shared(name) and step_of(name) is None:
        (self.folder / name).unlink(missing_ok=True)
    lacking = {name: stamp for name, stamp in small.items() if have.get(name) != stamp}
    index_lib.fetch(self._store, self.folder, lacking)
    self._keep(published, self._fetch_shared(have, published))
    self._index, self._looked = index, time.monotonic()

  def steps(self) -> list[int]:
    """Steps of the checkpoints that the store has."""
    self.refresh()
    return sorted(self._steps_of(self._index))

  def stamps(self, step: int) -> set[tuple[str, int, int]]:
    """(name, bytes, modification time in nanoseconds) of a checkpoint's files."""
    self.refresh()
    files = self._index.files
    return {(name, *files[name]) for name in files if step_of(name) == step}

  def read(self, name: str) -> bytes:
    """The content of a small file in a checkpoint, without fetching the checkpoint; empty if there
    is no such file, or if the store does not answer."""
    self.refresh()
    stamp = self._index.files.get(name)
    if stamp is None:
      return b""
    if self._texts.get(name, (None,))[0] != stamp:
      try:
        found = self._store.read(name)
      except StoreError:
        return b""
      self._texts[name] = stamp, found[0] if found else b""
    return self._texts[name][1]

  def fetch_checkpoint(self, step: int | None) -> None:
    """Fetches the checkpoint of a step, or the newest one whose files match their sums."""
    for candidate in self.steps()[::-1] if step is None else [step]:
      self._fetch_step(candidate)
      if not sums.folder_mismatch(self.folder / f"checkpoints/{candidate}"):
        return

  def _fetch_step(self, step: int) -> None:
    """Fetches a checkpoint so that other processes never see a part of it in its place."""
    wanted = {name: stamp for name, stamp in self._index.files.items() if step_of(name) == step}
    have = index_lib.scan(self.folder)
    if all(have.get(name) == stamp for name, stamp in wanted.items()):
      return
    coming = self.folder / f".fetching-{step}-{time.time_ns()}"
    target = self.folder / f"checkpoints/{step}"
    try:
      index_lib.fetch(self._store, coming, wanted)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(parents=True, exist_ok=True)
      if (coming / f"checkpoints/{step}").exists():  # otherwise it was deleted meanwhile
        (coming / f"checkpoints/{step}").rename(target)
    finally:
      shutil.rmtree(coming, ignore_errors=True)

  def publish(self) -> None:
    """Uploads what evaluation jobs wrote into the folder and the store does not have yet."""
    published = index_lib.last_of(self.folder).files
    have = {n: stamp for n, stamp in index_lib.scan(self.folder).items() if is_shared(n)}
    new = {name: stamp for name, stamp in have.items() if published.get(name) != stamp}
    for name in new:
      self._store.upload(name, self.folder / name)
    self._keep(published, {**published, **new})

  def _keep(self, before: dict[str, Stamp], published: dict[str, Stamp]) -> None:
    """Records, for this and later processes, which files of evaluation jobs the store has, so that
    their deletion there is noticed. The file also marks this folder as a copy to runs around it."""
    if published != before or not (self.folder / INDEX).exists():
      self.folder.mkdir(parents=True, exist_ok=True)
      index_lib.keep(self.folder, index_lib.EMPTY.after(published))

  def _fetch_shared(self, have: dict[str, Stamp], published: dict[str, Stamp]) -> dict[str, Stamp]:
    """Fetches what other jobs wrote, and removes what was published but is gone from the store;
    what this job wrote since its last `publish` stays. Returns what is published afterwards."""
    sizes = {
      n: size for folder in index_lib.SHARED for n, size in self._store.sizes(folder).items()
    }
    for name, stamp in published.items():
      if name not in sizes and have.get(name) == stamp:
        (self.folder / name).unlink(missing_ok=True)
    now = time.time_ns()
    other = {
      name: (size, now)
      for name, size in sizes.items()
      if name not in have or (size != have[name][0] and published.get(name) in (None, have[name]))
    }
    index_lib.fetch(self._store, self.folder, other)
    found = index_lib.scan(self.folder)
    same = {n: found[n] for n, size in sizes.items() if n in found and found[n][0] == size}
    return {name: stamp for name, stamp in published.items() if name in sizes} | same

  def _steps_of(self, index: index_lib.Index) -> set[int]:
    temporary = {int(found[1]) for found in map(TEMPORARY_STEP.match, index.files) if found}
    return steps_named(index.files) - temporary


def addresses_below(root: str) -> list[str]:
  """Addresses of the runs below an address, sorted. Errors: WorkdirError."""
  try:
    names = open_store(root).sizes()
  except StoreError as error:
    raise WorkdirError(str(error)) from None
  root = root.rstrip("/")
  found = [name for name in names if name == INDEX or name.endswith(f"/{INDEX}")]
  return sorted(f"{root}/{name.removesuffix(INDEX)}".rstrip("/") for name in found)
