"""The mirror of a run that trains: its folder here, and the store that is to have the same."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores.index import Index, Stamp, is_shared, step_of
from beyond_outliers.stores.lease import leased
from beyond_outliers.stores.store import Store, StoreError, cache_folder, is_address, open_store
from beyond_outliers.types import PathLike

Say = Callable[[str], None]
PUSH_SECONDS = 10.0  # between two looks at what is new
TRIES, WAIT_SECONDS = 3, 5.0  # at the end of a run


def spool(path: PathLike) -> PathLike:
  """The folder in which a run with this workdir works: the workdir, or, of an address, its place in
  BEYOND_OUTLIERS_CACHE. Errors: WorkdirError."""
  return cache_folder("runs", os.fspath(path)) if is_address(path) else path


@contextlib.contextmanager
def mirrored(
  address: str, folder: PathLike, *, sealed: bool, say: Say, store: Store | None = None
) -> Iterator[None]:
  """Holds the store's workdir, fetches what the folder lacks of it, and uploads what is new there
  until the context ends. sealed: a checkpoint once it has its sums, not before.

  The folder's lock is held. A store that fails meanwhile is told of, and tried again.
  Errors: WorkdirError before anything is begun; at the end StoreError with what is not uploaded,
  unless another error ends the context."""
  store = store or open_store(address)
  mirror = Mirror(store, pathlib.Path(folder), sealed=sealed, say=say)
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(leased(store, mirror.lose, say))
      mirror.begin()
    except OSError as error:
      raise WorkdirError(f"{error}; nothing was begun") from None
    thread = threading.Thread(target=mirror.run, name="mirror", daemon=True)
    thread.start()
    try:
      yield
    except BaseException:
      with contextlib.suppress(StoreError):  # the other error is the one to be seen
        mirror.end(thread)
      raise
    mirror.end(thread)


class Mirror:
  """A folder and its store. One thread at a time calls `push`."""

  def __init__(self, store: Store, folder: pathlib.Path, *, sealed: bool, say: Say):
    self._store, self._folder, self._sealed, self._say = store, folder, sealed, say
    self._known: dict[str, Stamp] = {}  # what the store has of the folder
    self._index = index_lib.EMPTY
    self._lost, self._told = "", False
    self._ended = threading.Event()

  def begin(self) -> None:
    """Makes the folder what the store has, or keeps it where it is as new or newer: nobody else has
    written there since this folder did. What is otherwise not uploaded is set aside."""
    theirs, ours = index_lib.in_store(self._store), index_lib.last_of(self._folder)
    if not theirs.id and self._store.read("config.json") is not None:
      raise WorkdirError(
        f"{self._store.address} holds a run without {index_lib.INDEX}, which was copied there; "
        "copy it to a folder, or give another --workdir"
      )
    have = index_lib.scan(self._folder, sealed=False)
    if theirs.id not in (ours.id, ours.previous):
      have = self._replace(have, theirs, ours)
      ours = theirs
      index_lib.keep(self._folder, theirs)
    self._index = theirs
    self._known = {
      name: stamp for name, stamp in theirs.files.items() if ours.files.get(name) == stamp
    }
    self._known |= self._fetch_shared(have)
    if not theirs.id:  # so that what is there from now on is known for a mirror's
      self._write_index({}, new=True)

  def _replace(self, have: dict[str, Stamp], theirs: Index, ours: Index) -> dict[str, Stamp]:
    """Makes the folder what the store has; returns what it has then."""
    mine = {name for name, stamp in have.items() if ours.files.get(name) != stamp}
    if not theirs.id or any(not is_shared(name) for name in mine):
      self._set_aside()
      have = {}
    self._say(f"fetching {self._store.address} to {self._folder}")
    for name in have.keys() - theirs.files.keys():
      if not is_shared(name):
        (self._folder / name).unlink(missing_ok=True)
    lacking = {name: stamp for name, stamp in theirs.files.items() if have.get(name) != stamp}
    index_lib.fetch(self._store, self._folder, lacking)
    # Of a process that ended before it could write the index that names them.
    named = {step_of(name) for name in theirs.files}
    orphans = [
      name
      for name in self._store.sizes("checkpoints")
      if step_of(name) is not None and step_of(name) not in named
    ]
    if orphans:
      self._store.delete(orphans)
    return index_lib.scan(self._folder, sealed=False)

  def run(self) -> None:
    """Pushes now and then, until `end`."""
    while not self._ended.wait(PUSH_SECONDS):
      self._try()

  def end(self, thread: threading.Thread) -> None:
    """Pushes the rest. Errors: StoreError with what is not uploaded."""
    self._ended.set()
    thread.join()
    self._sealed = False  # what has no sums by now will have none
    problem = self._try()
    for _ in range(TRIES - 1):
      if not problem or self._lost:
        break
      time.sleep(WAIT_SECONDS)
      problem = self._try()
    if problem:
      left = self._new(index_lib.scan(self._folder, sealed=False))
      names = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
      remedy = "" if self._lost else "; once the store can be written, the same command uploads it"
      raise StoreError(
        f"{problem}; not uploaded: {names or index_lib.INDEX}; it is in {self._folder}{remedy}"
      )

  def lose(self, reason: str) -> None:
    """Ends the uploads, and asks the run to stop: another one has the store."""
    self._lost = reason
    self._say(f"warning: {reason}; this run stops, and what it wrote stays in {self._folder}")
    os.kill(os.getpid(), signal.SIGTERM)

  def push(self) -> None:
    """Uploads what is new: checkpoints, and the index that makes them appear; then the rest, the
    status last, so that a run that says it is done has its last checkpoint. Errors: StoreError."""
    if self._lost:
      raise StoreError(self._lost)
    have = index_lib.scan(self._folder, sealed=self._sealed)
    new = self._new(have)
    steps = [name for name in new if step_of(name) is not None]
    for names in (steps, sorted(set(new) - set(steps), key=lambda name: name == "status.json")):
      if names:
        self._upload(names, have)
        self._write_index(have)
    self._write_index(have)
    gone = [name for name in self._known if name not in have]
    if gone:
      self._store.delete(gone)
      for name in gone:
        del self._known[name]

  def _try(self) -> str:
    """`push`; returns why it failed, which is said once for each time that the store goes."""
    try:
      self.push()
    except OSError as error:
      if not self._told and not self._lost:
        self._say(f"warning: {error}; goes on in {self._folder}, to be uploaded later")
      self._told = True
      return str(error)
    if self._told:
      self._say(f"{self._store.address}: all is uploaded again")
    self._told = False
    return ""

  def _new(self, have: dict[str, Stamp]) -> list[str]:
    return [name for name, stamp in have.items() if self._known.get(name) != stamp]

  def _upload(self, names: list[str], have: dict[str, Stamp]) -> None:
    """Errors: StoreError, once all that can be uploaded is."""

    def upload(name: str) -> None:
      self._store.upload(name, self._folder / name)
      self._known[name] = have[name]  # what changes meanwhile has another time, and comes again

    last = [name for name in names if name == "status.json"]
    failed = index_lib.attempts(upload, [name for name in names if name not in last])
    failed |= index_lib.attempts(upload, last if not failed else [])
    problems = [error for error in failed.values() if not isinstance(error, FileNotFoundError)]
    gone = {step_of(name) for name in failed} - {None}
    if gone:  # deleted meanwhile (checkpoint.keep)
      for name in [name for name in have if step_of(name) in gone]:
        del have[name]
    if problems:
      raise StoreError(str(problems[0]))

  def _write_index(self, have: dict[str, Stamp], new: bool = False) -> None:
    partial = {step_of(name) for name in self._new(have)} - {None}
    files = {
      name: stamp
      for name, stamp in self._known.items()
      if name in have and not is_shared(name) and step_of(name) not in partial
    }
    if files == self._index.files and not new:
      return
    index = self._index.after(files)
    index_lib.keep(self._folder, index)  # first: `begin` takes the one before for its own, too
    self._store.write(index_lib.INDEX, index.encoded())
    self._index = index

  def _fetch_shared(self, have: dict[str, Stamp]) -> dict[str, Stamp]:
    """What evaluation jobs left in the store, so that a run that goes back can set it aside."""
    names = [name for folder in index_lib.SHARED for name in self._store.sizes(folder)]
    now = time.time_ns()
    index_lib.fetch(self._store, self._folder, {n: (0, now) for n in names if n not in have})
    found = index_lib.scan(self._folder, sealed=False)
    return {name: found[name] for name in names if name in found}

  def _set_aside(self) -> None:
    aside = self._folder.with_name(f"{self._folder.name}.aside-{time.time_ns()}")
    aside.mkdir()
    for entry in self._folder.iterdir():
      if entry.name != "lock":
        entry.rename(aside / entry.name)
    self._say(
      f"warning: {self._store.address} was written, or emptied, elsewhere since; what "
      f"{self._folder} had is in {aside}"
    )
