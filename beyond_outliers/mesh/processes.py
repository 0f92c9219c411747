"""Processes of one run: how they join, agree before any work, and end together.

They meet in JAX's coordination service on process 0, which watches their heartbeats and holds a
table of text. A process that ends with an error writes it there, and the others end too, instead of
waiting in a collective. If one is killed or hangs, JAX misses its heartbeat and aborts the others
in C++: the SIGABRT handler here reports what happened and exits.
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

POLL_SECONDS = 1.0  # time between two looks at the table
FAILED, REFUSED = 1, 2  # exit codes
DAY_MS = 24 * 3600 * 1000  # timeout: one of them may be preparing the data
GONE = "was killed, is stuck or cannot be reached"
ALIVE, ENDED, AGREED = "alive/", "ended/", "agreed/"  # folders of the table: one text per process

_peers: Peers | None = None  # set once this process has joined others
_wait = 0.0, ""  # until when it waits for the others, and what an abort after that means


def join(c: config.Distributed, found: cluster.Membership, *, stops: bool = True) -> None:
  """Connects the processes of one run; JAX determines whatever is None in `found`.

  stops: whether processes check at every step if one got SIGTERM; if not, the signal ends it.

  Ends this process if another does not come within `initialization_seconds`. Errors: ConfigError if
  JAX finds no processes; Failure if process 0 cannot listen."""
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
  """Whether this is the process that prints and writes; does not initialize JAX's devices."""
  return _peers is None or _peers.index == 0


def raise_alone(error: Exception) -> None:
  """Raises an error that may concern only this one of several processes, such as lack of memory:
  the others then wait in a collective that this one will not enter.

  A Refusal is raised by all of them, unless it is about data, which each process reads itself."""
  if _peers is not None and (isinstance(error, DataError) or not isinstance(error, Refusal)):
    raise error


def agree(what: str, find: Callable[[], Mapping[str, Any]]) -> None:
  """Refuses values that differ from those of process 0. what: their name, used only once per run.

  Errors: WorkdirError with the key and both values."""
  if _peers is not None:
    _peers.agree(what, find())


@contextlib.contextmanager
def last_words(write: Callable[[str], None]) -> Iterator[None]:
  """Context in which `write` gets the reason if this process has to end because of another."""
  if _peers is not None:
    _peers.write = write
  yield
  if _peers is not None:
    _peers.write = None


def reason_of(error: BaseException) -> str:
  """The reason why a run ends: the error, and the lost process if a collective failed for that."""
  found = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
  return _peers.without_one(found) if _peers is not None and _may_be_of_another(error) else found


def _may_be_of_another(error: BaseException | None) -> bool:
  """Whether the error or its cause may be a failed collective or barrier: JaxRuntimeError when one
  is awaited, ValueError when a result is read, TimeoutError from Orbax."""
  kinds = jax.errors.JaxRuntimeError | ValueError | TimeoutError
  if error is None or isinstance(error, Refusal):
    return False
  return isinstance(error, kinds) or _may_be_of_another(error.__cause__)


def leave(error: BaseException) -> NoReturn:
  """Ends this process with an error, once the others know of it. In a single process, an interrupt
  is raised again instead.

  A normal exit would hang: JAX would wait for processes that wait in a collective, and Python for
  Orbax's threads, which wait minutes for a folder that could not be made."""
  if _peers is None and not isinstance(error, Exception):
    raise error
  refused = isinstance(error, Refusal)
  code, reason = (REFUSED, str(error)) if refused else (FAILED, reason_of(error))
  if _peers is not None:
    _peers.ending.acquire()  # if another thread is already ending this process, it reports instead
  if not isinstance(error, Refusal | Failure):
    _tell("".join(traceback.format_exception(error)))
  _tell(f"error: {reason}\n")
  if _peers is not None:
    _peers.tell(code, reason)
  _exit(code)


def tell(code: int, reason: str) -> None:
  """Makes the other processes end for this reason and with this exit code, as this one will."""
  if _peers is not None and _peers.ending.acquire(blocking=False):
    _peers.tell(code, reason)


def end(code: int) -> NoReturn:
  """Ends this process, whose work is done, once the others are done too; while Python still runs,
  so that a reason for which JAX aborts it can be reported."""
  if _peers is None:
    sys.exit(code)
  sys.stdout.flush()
  _peers.end(code)


class Peers:
  """This process among the others, with a thread that watches whether one of them has ended."""

  def __init__(self, client: Any, index: int, count: int):
    self._client, self.index, self._count = client, index, count
    self.write: Callable[[str], None] | None = None
    self._beats = dict.fromkeys(range(count), ("", time.monotonic()))  # (beat, when it changed)
    self.ending = threading.Lock()  # held as soon as this process is ending
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
      # The table ends with process 0, so that one gives the others time to read it.
      for _ in range(5 if self.index == 0 else 0):
        if len(self._client.key_value_dir_get(ENDED)) == self._count:
          break
        time.sleep(POLL_SECONDS)

  def end(self, code: int) -> NoReturn:
    self.ending.acquire()
    with contextlib.suppress(Exception):  # another process did not reach the end in time
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
      except Exception:  # if the table is lost, JAX will signal it
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
    """Ends this process because of another, unless it is already ending."""
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

  @functools.cache  # noqa: B019  (there is only one instance, and this takes seconds)
  def without_one(self, found: str) -> str:
    """What went wrong, preceded by the process that gives no sign of life, if there is one."""
    time.sleep(4 * POLL_SECONDS)  # its last beat may be recent
    now = time.monotonic()
    gone = [
      index
      for index, (_, when) in self._beats.items()
      if index != self.index and now - when > 3 * POLL_SECONDS
    ]
    # The table is on process 0: if that is gone, no beat changes, and min names it.
    return f"process {min(gone)} of {self._count} {GONE}: {found}" if gone else found

  def missing(self) -> None:
    """Ends this process because JAX misses another: the one whose last beat is oldest."""
    if self.ending.acquire(blocking=False):
      now = time.monotonic()
      others = {i: now - when for i, (_, when) in self._beats.items() if i != self.index}
      index = max(others, key=others.__getitem__)
      if self.index != 0 and others[index] < 3 * POLL_SECONDS:
        index = 0  # its service closed the connection, so it ended just now
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
  """Prints to stderr, ignoring errors: a full disk may be the reason why a process ends."""
  with contextlib.suppress(OSError):
    print(text, end="", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  os._exit(code)  # without JAX's barrier, which the others would not reach or have already passed


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
  """C handler of SIGABRT: JAX's C++ raises it in a thread that runs no Python handlers."""
  try:
    if _peers is not None:
      _peers.missing()
    until, late = _wait
    early = "JAX ended this process, and says why above; start all again"
    _tell(f"error: {early if time.monotonic() < until else late}\n")
  finally:
    os._exit(FAILED)
