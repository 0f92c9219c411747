"""What a starting run fetches from its store, and what it keeps in its local folder."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Collection

from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores import retention
from beyond_outliers.stores.index import INDEX, Index, Stamp, is_shared, step_of, steps_named
from beyond_outliers.stores.store import DeniedError, Store


def check_alone(store: Store) -> None:
  """Refuses an address inside another run's, or around one: the two would mix their files.

  Errors: WorkdirError, StoreError."""
  found = [f"{store.address}/{name}" for name in store.sizes() if name.endswith(f"/{INDEX}")]
  for outer in store.above():
    with contextlib.suppress(DeniedError):  # the account may be limited to its own folder
      found += [f"{outer.address}/{INDEX}"] if outer.read(INDEX) else []
  if found:
    other = found[0].removesuffix(f"/{INDEX}")
    raise WorkdirError(
      f"{store.address}: {other} holds a run, and one of the two would lie inside the other; give "
      "another --workdir"
    )


class Fetching:
  """A store and the folder that should have the same files. `have` is what the folder has; methods
  return what it has afterwards, unless they say otherwise. Errors of all methods: OSError."""

  def __init__(self, store: Store, folder: pathlib.Path, say: Callable[[str], None]):
    self._store, self._folder, self._say = store, folder, say

  def complete(
    self, have: dict[str, Stamp], theirs: Index, aside: Collection[str]
  ) -> dict[str, Stamp]:
    """Fetches what the folder once had but has lost, wholly or in part. aside: names of files that
    it has set aside."""

    def is_lacking(name: str, stamp: Stamp) -> bool:
      size, time_of_change = have.get(name, (-1, 0))
      return size != stamp[0] and time_of_change <= stamp[1] and name not in aside

    lacking = {name: stamp for name, stamp in theirs.files.items() if is_lacking(name, stamp)}
    if not lacking:
      return have
    self._say(
      f"fetching {len(lacking)} files of {self._store.address} that {self._folder} lacks; to "
      "remove a file for good, remove it there, too"
    )
    index_lib.fetch(self._store, self._folder, lacking)
    return index_lib.scan(self._folder)

  def replace(self, have: dict[str, Stamp], theirs: Index, ours: Index) -> dict[str, Stamp]:
    """Makes the folder equal to the store. ours: the index of when the two were last equal."""
    mine = {name for name, stamp in have.items() if ours.files.get(name) != stamp}
    if not theirs.id or any(not is_shared(name) for name in mine):
      whole = [entry for entry in self._folder.iterdir() if entry.name != "lock"]
      self._set_aside([entry for entry in whole if not any(entry.rglob(INDEX))])  # of another run
      have = {}
    else:
      # Files that the other run set aside, or that a job made in this folder only.
      names = self._shared_names()
      self._set_aside([self._folder / n for n in have if is_shared(n) and n not in names])
    self._say(f"fetching {self._store.address} to {self._folder}")
    for name in have.keys() - theirs.files.keys():
      if not is_shared(name):
        (self._folder / name).unlink(missing_ok=True)
    for step in steps_named(have) - steps_named(theirs.files):
      shutil.rmtree(self._folder / f"checkpoints/{step}", ignore_errors=True)  # empty by now
    lacking = {name: stamp for name, stamp in theirs.files.items() if have.get(name) != stamp}
    index_lib.fetch(self._store, self._folder, lacking)
    # Left by a process that ended before it could write the index that names them.
    named = steps_named(theirs.files)
    orphans = [
      name
      for name in self._store.sizes("checkpoints")
      if (step := step_of(name)) is not None and step not in named
    ]
    if orphans:
      self._store.delete(orphans)
    return index_lib.scan(self._folder)

  def shared(self, have: dict[str, Stamp]) -> dict[str, Stamp]:
    """Fetches the files of evaluation jobs, so that a run that goes back can set them aside.
    Returns those that the store has.

    Files that were set aside, by a process that ended before it could delete them in the store, are
    not fetched again."""
    names = self._shared_names()
    aside = {
      place: stamp
      for name, stamp in have.items()
      if (place := retention.place_of(name)) in names
      and place not in have
      and self._has_now(place, (self._folder / name).read_bytes())
    }
    now = time.time_ns()
    lacking = {name: (0, now) for name in names if name not in have and name not in aside}
    index_lib.fetch(self._store, self._folder, lacking)
    found = index_lib.scan(self._folder)
    return {name: found[name] for name in names if name in found} | aside

  def _has_now(self, name: str, content: bytes) -> bool:
    """Whether the store has this content: another job may have written other content since."""
    found = self._store.read(name)
    return found is not None and found[0] == content

  def _shared_names(self) -> list[str]:
    return [name for folder in index_lib.SHARED for name in self._store.sizes(folder)]

  def _set_aside(self, paths: list[pathlib.Path]) -> None:
    if not paths:
      return
    aside = self._folder.with_name(f"{self._folder.name}.aside-{time.time_ns()}")
    for path in paths:
      target = aside / path.relative_to(self._folder)
      target.parent.mkdir(parents=True, exist_ok=True)
      path.rename(target)
    self._say(
      f"warning: {self._store.address} was written, or emptied, elsewhere since; what "
      f"{self._folder} had and the store does not have is now in {aside}"
    )
