"""Processes of one run: how they join, agree before any work, and end together.

They meet in JAX's coordination service, on process 0: it counts their heartbeats and holds a table
of text. A process that ends by an error says so there, and the others end too, instead of waiting
in a collective. One that is killed, or stands still, is missed by JAX, which then aborts the
others in C++: the handler of SIGABRT here says what happened and exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # the client has no public name

from beyond_outliers import config
from beyond_outliers.config import cluster
from beyond_outliers.errors import ConfigError, DataError, Failure, Refusal, WorkdirError

POLL_SECONDS = 1.0  # between two looks at the table
FAILED, REFUSED = 1, 2  # exit codes
DAY_MS = 24 * 3600 * 1000  # for one of them prepares the data
GONE = "was killed, is stuck or cannot be reached"
ALIVE, ENDED, AGREED = "alive/", "ended/", "agreed/"  # folders of the table: one text per process

_peers: Peers | None = None  # of this process, once it has joined others
_wait = 0.0, ""  # until when it waits for them, and what an abort means then


def join(c: config.Distributed, found: cluster.Membership, *, stops: bool = True) -> None:
  """Connects the processes of one run; what is None, JAX finds.

  stops: whether they will ask, every step, if one got SIGTERM; else that ends it.

  Ends this process if one does not come within `initialization_seconds`. Errors: ConfigError where
  JAX finds none; Failure where process 0 cannot listen."""
  global _peers, _wait
  if found.address:
    what = f"process {found.index} of {found.count} (by {found.source}), which meet"
    _tell(f"{what} at {found.address}\n")
    if found.index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
      cluster.check_free(found.address)
  _wait = (
    time.monotonic() + c.initialization_seconds,
    "not all processes came within distributed.initialization_seconds = "
    f"{c.initialization_seconds}; start all {found.count or ''} of them",
  )
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))
  jax.config.update("jax_enable_preemption_service", stops)
  try:
    jax.distributed.initialize(
      found.address,
      found.count,
      found.index,
      found.devices,
      cluster_detection_method=None if found.address is None else "deactivate",
      initialization_timeout=c.initialization_seconds,
      heartbeat_timeout_seconds=c.heartbeat_seconds,
      shutdown_timeout_seconds=c.shutdown_seconds,
    )
  except ValueError as error:
    raise ConfigError(
      f"--distributed: JAX cannot find the other processes through {found.source} ({error}); give "
      "HOST:PORT,COUNT,INDEX"
    ) from None
  state = jax_distributed.global_state
  _peers = Peers(state.client, state.process_id, state.num_processes)


def is_first() -> bool:
  """Whether this is the process that speaks and writes; asks JAX for no device."""
  return _peers is None or _peers.index == 0


def raise_alone(error: Exception) -> None:
  """Raises an error that only this one of several processes may have met, such as no memory: the
  others wait in a collective that nobody else will enter. A refusal all processes meet alike,
  except that of data, which each reads itself."""
  if _peers is not None and (isinstance(error, DataError) or not isinstance(error, Refusal)):
    raise error


def agree(what: str, find: Callable[[], Mapping[str, Any]]) -> None:
  """Refusal, on every process, of values that are not those of process 0. what: their name, each
  asked for once. Errors: WorkdirError with the key and both values."""
  if _peers is not None:
    _peers.agree(what, find())


@contextlib.contextmanager
def last_words(write: Callable[[str], None]) -> Iterator[None]:
  """`write` is called with the reason when this process is about to end because of another."""
  if _peers is not None:
    _peers.write = write
  yield
  if _peers is not None:
    _peers.write = None


def reason_of(error: BaseException) -> str:
  """What ends a run: the error, and the process that is gone where a collective fails for that."""
  found = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
  return _peers.without_one(found) if _peers is not None and _may_be_of_another(error) else found


def _may_be_of_another(error: BaseException | None) -> bool:
  """Whether the error, or its cause, may be a collective or a barrier that failed: JAX raises
  JaxRuntimeError when it waits, ValueError when it reads a result, and Orbax TimeoutError."""
  kinds = jax.errors.JaxRuntimeError | ValueError | TimeoutError
  if error is None or isinstance(error, Refusal):
    return False
  return isinstance(error, kinds) or _may_be_of_another(error.__cause__)


def leave(error: BaseException) -> NoReturn:
  """Ends this process because of an error, once the others know it; of a single process,
  an interrupt is raised again instead.

  Without this JAX would wait at its exit for processes that wait in a collective, and Python for
  Orbax's threads, which wait minutes for a folder that could not be made."""
  if _peers is None and not isinstance(error, Exception):
    raise error
  refused = isinstance(error, Refusal)
  code, reason = (REFUSED, str(error)) if refused else (FAILED, reason_of(error))
  if _peers is not None:
    _peers.ending.acquire()  # what ends this process meanwhile says what there is to say
  if not isinstance(error, Refusal | Failure):
    _tell("".join(traceback.format_exception(error)))
  _tell(f"error: {reason}\n")
  if _peers is not None:
    _peers.tell(code, reason)
  _exit(code)


def tell(code: int, reason: str) -> None:
  """Has the other processes end, for that reason and with that exit code, as this one will."""
  if _peers is not None and _peers.ending.acquire(blocking=False):
    _peers.tell(code, reason)


def end(code: int) -> NoReturn:
  """Ends this process, whose work is done, once the others' work is done, too: while it waits,
  Python can still say why JAX would abort it."""
  if _peers is None:
    sys.exit(code)
  sys.stdout.flush()
  _peers.end(code)


class Peers:
  """This process among the others, with a thread that looks whether one has ended."""

  def __init__(self, client: Any, index: int, count: int):
    self._client, self.index, self._count = client, index, count
    self.write: Callable[[str], None] | None = None
    self._beats = dict.fromkeys(range(count), ("", time.monotonic()))  # and when they last changed
    self.ending = threading.Lock()  # held from when this process ends
    threading.Thread(target=self._look, name="peers", daemon=True).start()

  def agree(self, what: str, mine: Mapping[str, Any]) -> None:
    text = json.dumps(mine, sort_keys=True, default=str)
    self._client.key_value_set(f"{AGREED}{what}/{self.index}", text)
    first = self._client.blocking_key_value_get(f"{AGREED}{what}/0", DAY_MS)
    if text != first:
      theirs, ours = json.loads(first), json.loads(text)
      key = next(k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k))
      raise WorkdirError(
        f"{key}: {theirs.get(key)!r} on process 0, {ours.get(key)!r} on process {self.index}: the "
        "processes of one run must be started alike; nothing was done"
      )
    self._client.wait_at_barrier(f"{AGREED}{what}", DAY_MS)

  def tell(self, code: int, reason: str) -> None:
    ended = json.dumps({"code": code, "reason": reason})
    with contextlib.suppress(Exception):  # the table may be gone
      self._client.key_value_set(f"{ENDED}{self.index}", ended, True)
      # The table ends with process 0: the others need time to read it.
      for _ in range(5 if self.index == 0 else 0):
        if len(self._client.key_value_dir_get(ENDED)) == self._count:
          break
        time.sleep(POLL_SECONDS)

  def end(self, code: int) -> NoReturn:
    self.ending.acquire()
    with contextlib.suppress(Exception):  # of another that did not come to the end in time
      jax.distributed.shutdown()
    _exit(code)

  def _look(self) -> None:
    beat = 0
    while True:
      time.sleep(POLL_SECONDS)
      beat += 1
      try:
        self._client.key_value_set(f"{ALIVE}{self.index}", str(beat), True)
        alive, ended = (
          {_index(key): text for key, text in self._client.key_value_dir_get(folder)}
          for folder in (ALIVE, ENDED)
        )
      except Exception:  # what has become of the table JAX will say, with a signal
        continue
      now = time.monotonic()
      for index, text in alive.items():
        if text != self._beats[index][0]:
          self._beats[index] = (text, now)
      for index, text in sorted(ended.items()):
        if index != self.index:
          found = json.loads(text)
          self._end(found["code"], f"process {index} of {self._count}: {found['reason']}")

  def _end(self, code: int, reason: str) -> None:
    """Ends this process because of another, unless it is about to end anyway."""
    if not self.ending.acquire(blocking=False):
      return
    try:
      self._say(reason)
    finally:
      self.tell(code, reason)
      _exit(code)

  def _say(self, reason: str) -> None:
    _tell(f"error: {reason}\n")
    if self.write is not None:
      self.write(reason)

  @functools.cache  # noqa: B019  (there is one of it; and it takes seconds to find out)
  def without_one(self, found: str) -> str:
    """What went wrong; if a process gives no sign of life, after the name of that process."""
    time.sleep(4 * POLL_SECONDS)  # its last may be of just now
    now = time.monotonic()
    gone = [
      index
      for index, (_, when) in self._beats.items()
      if index != self.index and now - when > 3 * POLL_SECONDS
    ]
    # The table is on process 0: without it nobody gives one.
    return f"process {min(gone)} of {self._count} {GONE}: {found}" if gone else found

  def missing(self) -> None:
    """Ends this process because JAX misses another: the one whose last sign of life is oldest."""
    if self.ending.acquire(blocking=False):
      now = time.monotonic()
      others = {i: now - when for i, (_, when) in self._beats.items() if i != self.index}
      index = max(others, key=others.__getitem__)
      if self.index != 0 and others[index] < 3 * POLL_SECONDS:
        index = 0  # its service closed a connection: it ended just now
      silent = f"no sign of life for {others[index]:.0f} s"
      if others[index] < 3 * POLL_SECONDS:
        silent = "it ended just now, or another was started in its place"
      self._say(
        f"process {index} of {self._count} {GONE}: {silent}; look at its log, and start all again"
      )
      _exit(FAILED)


def _index(key: str) -> int:
  return int(key.rpartition("/")[-1])


def _tell(text: str) -> None:
  """Says it, if there is room: a full disk, which may be why a process ends, has none."""
  with contextlib.suppress(OSError):
    print(text, end="", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  os._exit(code)  # without JAX's barrier, at which nobody would come, or which is behind


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
  """Handler of SIGABRT, in C: JAX's C++ raises it in a thread where no handler of Python's runs."""
  try:
    if _peers is not None:
      _peers.missing()
    until, late = _wait
    early = "JAX ended this process, and says why above; start all again"
    _tell(f"error: {early if time.monotonic() < until else late}\n")
  finally:
    os._exit(FAILED)
