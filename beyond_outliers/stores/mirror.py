"""The mirror of a run during training: keeps the store equal to the local folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores import fetching, retention
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores.index import Stamp, is_shared, step_of, steps_named
from beyond_outliers.stores.lease import STALE_SECONDS, Hold, leased
from beyond_outliers.stores.store import (
  ChangedError,
  Store,
  StoreError,
  cache_folder,
  is_address,
  open_store,
)
from beyond_outliers.types import PathLike

Say = Callable[[str], None]
PUSH_SECONDS = 10.0  # time between two uploads of what is new
TRIES, WAIT_SECONDS = 3, 5.0  # at the end of a run


def spool(path: PathLike) -> PathLike:
  """The folder in which a run with this workdir works: the workdir itself, or for an address a
  folder in BEYOND_OUTLIERS_CACHE. Errors: WorkdirError."""
  return cache_folder("runs", os.fspath(path)) if is_address(path) else path


@contextlib.contextmanager
def mirrored(
  address: str, folder: PathLike, *, sealed: bool, say: Say, store: Store | None = None
) -> Iterator[None]:
  """Holds the store's workdir, fetches what the folder lacks, and uploads what is new in the folder
  until the context ends. sealed: checkpoints are uploaded only once they have their sums.

  The caller holds the folder's lock. If the store fails meanwhile, warns and tries again.
  Errors: WorkdirError before anything is begun; at the end StoreError naming what is not uploaded,
  unless another error ends the context."""
  store = store or open_store(address)
  mirror = Mirror(store, pathlib.Path(folder), sealed=sealed, say=say)
  with contextlib.ExitStack() as stack:
    try:
      mirror.begin(stack.enter_context(leased(store, mirror.lose, say)))
    except OSError as error:
      raise WorkdirError(f"{error}; nothing was begun") from None
    thread = threading.Thread(target=mirror.run, name="mirror", daemon=True)
    thread.start()
    try:
      yield
    except BaseException:
      with contextlib.suppress(StoreError):  # must not hide the error that ended the context
        mirror.end(thread)
      raise
    mirror.end(thread)


class Mirror:
  """A folder and its store. Only one thread at a time may call `push`."""

  def __init__(self, store: Store, folder: pathlib.Path, *, sealed: bool, say: Say):
    self._store, self._folder, self._sealed, self._say = store, folder, sealed, say
    self._known: dict[str, Stamp] = {}  # what the store has of the folder
    self._index = self._sent = index_lib.EMPTY  # the store's index; the index last sent there
    self._tag: str | None = None  # of the store's index
    self._tags: dict[str, str | None] = {}  # of files that are replaced, by name
    self._hold: Hold = lambda within: None
    self._lost, self._told = "", False
    self._ended = threading.Event()

  def begin(self, hold: Hold | None = None) -> None:
    """Makes the folder equal to the store; or, if no one else has written to the store since this
    folder did, keeps the folder as it is, as new or newer.

    In the first case, what was not uploaded is set aside; in both, what the folder lacks is
    fetched. hold: the lease's."""
    self._hold = hold or self._hold
    fetching.check_alone(self._store)
    (theirs, self._tag), ours = index_lib.read(self._store), index_lib.last_of(self._folder)
    if not theirs.id and self._store.read("config.json") is not None:
      raise WorkdirError(
        f"{self._store.address} holds a run without {index_lib.INDEX}, so it was copied there by "
        "other means; copy it to a folder, or give another --workdir"
      )
    fetch = fetching.Fetching(self._store, self._folder, self._say)
    have = index_lib.scan(self._folder)
    aside: list[str] = []
    if theirs.id not in (ours.id, ours.previous):
      have = fetch.replace(have, theirs, ours)
      ours = theirs
      index_lib.keep(self._folder, theirs)
    else:
      aside = retention.set_aside(have, theirs.files, self._whole(have))
      have = fetch.complete(have, theirs, aside)
    self._index = self._sent = theirs
    self._known = {
      name: stamp
      for name, stamp in theirs.files.items()
      if stamp in (ours.files.get(name), have.get(name)) and (name in have or name in aside)
    }
    self._known |= fetch.shared(have)
    if not theirs.id:  # marks what is there from now on as a mirror's
      self._write_index({}, new=True)

  def run(self) -> None:
    """Pushes every PUSH_SECONDS until `end`."""
    while not self._ended.wait(PUSH_SECONDS):
      self._try()

  def end(self, thread: threading.Thread) -> None:
    """Pushes the rest. Errors: StoreError naming what is not uploaded."""
    self._ended.set()
    thread.join()
    problem = self._try(last=True)
    for _ in range(TRIES - 1):
      if not problem or self._lost:
        break
      time.sleep(WAIT_SECONDS)
      problem = self._try(last=True)
    if not problem and not self._index.files:  # a start that failed leaves no run behind
      with contextlib.suppress(StoreError):
        self._store.delete([index_lib.INDEX])
    if problem:
      left: list[str] = []
      with contextlib.suppress(OSError):  # the folder may be the problem
        left = self._new(index_lib.scan(self._folder))
      names = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
      remedy = "" if self._lost else "; once the store can be written, the same command uploads it"
      raise StoreError(
        f"{problem}; not uploaded: {names or index_lib.INDEX}; it is in {self._folder}{remedy}"
      )

  def lose(self, reason: str) -> None:
    """Ends the uploads, and asks the run to stop: another process has the store, or the folder has
    lost files."""
    if self._lost:
      return
    self._lost = reason
    self._say(f"warning: {reason}; this run stops, and what it wrote stays in {self._folder}")
    if not self._ended.is_set():
      os.kill(os.getpid(), signal.SIGTERM)

  def push(self, last: bool = False) -> None:
    """Uploads what is new, then the index, which makes new checkpoints appear, so that they come
    with their rows; then the status, so that a run that says it is done has its last checkpoint.
    Deletes what the run has deleted. last: checkpoints without sums too, which will get none.

    Errors: StoreError; OSError if the folder cannot be read."""
    if self._lost:
      raise StoreError(self._lost)
    found, whole, aside = self._look()
    partial = set() if last else steps_named(found) - whole
    have = {name: stamp for name, stamp in found.items() if step_of(name) not in partial}
    new = self._new(have)
    if new or aside:
      self._check_held()
    if aside:  # before the rows, which may have been cut back to an older checkpoint's
      self._write_index({n: s for n, s in self._index.files.items() if n not in aside})
      self._delete(aside)
    for names in ([n for n in new if n != "status.json"], [n for n in new if n == "status.json"]):
      self._upload(names, have)
      newest = max(steps_named(have) & whole, default=-1)  # uploaded by now
      gone = retention.superseded(found, self._known, newest)
      self._write_index(self._files(have, gone))
      self._delete(gone)

  def _look(self) -> tuple[dict[str, Stamp], set[int], list[str]]:
    """(what the folder has, steps of its whole checkpoints, which known files it has set aside).

    Errors: StoreError, from then on always, if the folder has lost part of the run: it then no
      longer says what the store should have."""
    missing = ""
    for wait in (0.0, WAIT_SECONDS):  # looks twice: the run may be moving files
      if missing:
        time.sleep(wait)
      found = index_lib.scan(self._folder)
      whole = self._whole(found)
      aside = retention.set_aside(found, self._known, whole)
      missing = retention.lost(found, self._known.keys() - set(aside))
      if not missing:
        return found, whole, aside
    self.lose(
      f"{self._folder} has lost {missing} while it was in use; {self._store.address} keeps what it "
      "has, and the same command fetches it"
    )
    raise StoreError(self._lost)

  def _whole(self, found: dict[str, Stamp]) -> set[int]:
    """Steps of the whole checkpoints; if they get no sums, of all."""
    return index_lib.whole_steps(self._folder, found) if self._sealed else steps_named(found)

  def _delete(self, names: list[str]) -> None:
    if names:
      self._hold(STALE_SECONDS / 2)  # whoever took over may have written some of the same names
      self._store.delete(names)
      for name in names:
        del self._known[name]

  def _try(self, last: bool = False) -> str:
    """Calls `push`; returns why it failed, or "". Warns once each time that the store goes away."""
    try:
      self.push(last)
    except OSError as error:
      if not self._told and not self._lost:
        self._say(f"warning: {error}; the run goes on in {self._folder}, to be uploaded later")
      self._told = True
      return str(error)
    if self._told:
      self._say(f"{self._store.address}: everything is uploaded again")
    self._told = False
    return ""

  def _new(self, have: dict[str, Stamp]) -> list[str]:
    return [name for name, stamp in have.items() if self._known.get(name) != stamp]

  def _upload(self, names: list[str], have: dict[str, Stamp]) -> None:
    """Uploads files. Errors: StoreError, once everything that can be uploaded has been."""

    def upload(name: str) -> None:
      if step_of(name) is None:
        self._replace(name)
      else:  # no condition needed: a checkpoint's files are guarded by its sums
        self._hold(STALE_SECONDS / 2)  # nobody takes over sooner
        self._store.upload(name, self._folder / name)
      self._known[name] = have[name]  # if it changed meanwhile, its new time makes it new again

    failed = index_lib.attempts(upload, names)
    problems = [error for error in failed.values() if not isinstance(error, FileNotFoundError)]
    gone = steps_named(failed)
    for name in [name for name in have if step_of(name) in gone]:
      del have[name]  # deleted meanwhile (checkpoint.keep)
    if problems:
      raise problems[0]

  def _replace(self, name: str) -> None:
    """Uploads a file on condition that the store's version is the one last seen: a late write, of a
    process that was suspended while another took over, must not overwrite the other's."""
    path = self._folder / name
    if name not in self._tags:
      self._tags[name] = self._store.tag(name)  # before the lease is known to be held
    self._hold(STALE_SECONDS / 2)
    try:
      self._tags[name] = self._store.upload(name, path, self._tags[name])
    except ChangedError:  # perhaps by our own write, whose answer was lost
      self._tags[name] = self._store.tag(name)
      self._check_held()
      self._tags[name] = self._store.upload(name, path, self._tags[name])

  def _files(self, have: dict[str, Stamp], gone: list[str]) -> dict[str, Stamp]:
    """The files for the index: a checkpoint not whole in the folder stays listed as it was."""
    here = steps_named(have)
    return {
      name: stamp
      for name, stamp in self._known.items()
      if not is_shared(name)
      and name not in gone
      and (step_of(name) in (None, *here) or name in self._index.files)
    }

  def _write_index(self, files: dict[str, Stamp], new: bool = False) -> None:
    if files == self._index.files and not new:
      return
    self._check_held()
    index = self._index.after(files)
    index_lib.keep(self._folder, index)  # first: `begin` also recognizes the previous index
    self._sent = index
    try:
      self._tag = self._store.write(index_lib.INDEX, index.encoded(), replaces=self._tag)
      self._index = index
    except ChangedError:
      self._check_held()
      if self._index is not index:
        raise

  def _check_held(self) -> None:
    """Checks that the store is still ours, by its lease and its index. Errors: StoreError."""
    self._hold(0.0)
    try:
      theirs, self._tag = index_lib.read(self._store)
    except WorkdirError:  # not an index that a mirror wrote
      theirs = index_lib.EMPTY
    if theirs.id not in (self._index.id, self._sent.id):
      self.lose(f"{self._store.address} was written, or emptied, elsewhere meanwhile")
      raise StoreError(self._lost)
    if theirs.id == self._sent.id:  # the answer to our write may have been lost
      self._index = self._sent
