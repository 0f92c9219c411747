"""The lock of a workdir in a store: an object that its holder renews.

Made and replaced on condition (that there is none; that it is the one that was read), so that of
two that try one succeeds, on every store that knows such conditions: S3 since 2024, GCS, MinIO, R2.
Who holds it must renew it; one that is not renewed for STALE_SECONDS, by the clock of whoever waits
for it, may be taken over."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores.index import LEASE
from beyond_outliers.stores.store import ChangedError, Store, StoreError
from beyond_outliers.types import Json

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0

# Renews the lease, unless it was within so many seconds. Errors: StoreError, TakenError.
Hold = Callable[[float], None]


class TakenError(StoreError):
  """A lease that is another's by now."""


@contextlib.contextmanager
def leased(store: Store, lost: Callable[[str], None], say: Callable[[str], None]) -> Iterator[Hold]:
  """Holds the store's workdir; yields what makes sure that it still does. lost: gets the reason, in
  any thread, once another took it.

  Waits for a holder that gives no sign of life, up to STALE_SECONDS.
  Errors: WorkdirError when another one holds it, StoreError."""
  lease = _Lease(store)
  lease.acquire(say)
  ended = threading.Event()

  def hold(within: float) -> None:
    taken = lease.renew(within)
    if taken:
      reason = f"{store.address} was taken over by {taken}"
      lost(reason)
      raise TakenError(reason)

  def renew() -> None:
    while not ended.wait(RENEW_SECONDS):
      try:
        hold(0.0)
      except TakenError:
        return
      except StoreError:  # as uploads will tell; the lease stands until somebody wants it
        continue

  thread = threading.Thread(target=renew, name="lease", daemon=True)
  thread.start()
  try:
    yield hold
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(StoreError):  # it then becomes stale
      lease.release()


class _Lease:
  def __init__(self, store: Store):
    self._store, self._tag, self._beat = store, "", 0
    self._id = secrets.token_hex(8)
    self._lock, self._renewed = threading.Lock(), _clocks()

  def acquire(self, say: Callable[[str], None]) -> None:
    while True:
      found = self._store.read(LEASE)
      try:
        if found is None:
          self._tag = self._store.write(LEASE, self._mine(), replaces=None)
          return
        if self._is_abandoned(*found, say):
          self._tag = self._store.write(LEASE, self._mine(), replaces=found[1])
          return
      except ChangedError:
        continue  # another one was faster

  def renew(self, within: float) -> str:
    """Returns who has taken it, if somebody has. within: seconds that the last renewal holds."""
    with self._lock:
      began = _clocks()
      if max(now - then for now, then in zip(began, self._renewed, strict=True)) < within:
        return ""
      try:
        self._tag = self._store.write(LEASE, self._mine(), replaces=self._tag)
      except ChangedError:
        found = self._store.read(LEASE)
        holder = _parsed(found[0]) if found else {}
        if found is None or holder.get("id") != self._id:
          return _name(holder)
        self._tag = found[1]  # what was written while its answer was lost
      self._renewed = began
      return ""

  def release(self) -> None:
    found = self._store.read(LEASE)
    if found is not None and found[1] == self._tag:
      self._store.delete([LEASE])

  def _mine(self) -> bytes:
    self._beat += 1  # so that its tag, a digest of the content, is another one
    return json.dumps(
      {
        "id": self._id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "beat": self._beat,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      }
    ).encode()

  def _is_abandoned(self, content: bytes, tag: str, say: Callable[[str], None]) -> bool:
    """Whether its holder is gone; waits to find out. False once the lease itself is gone. Errors:
    WorkdirError while it is held."""
    holder = _parsed(content)
    if holder.get("machine") == _machine() and not _lives(holder.get("pid")):
      return True
    say(
      f"{self._store.address} is held by {_name(holder)}; waiting up to {STALE_SECONDS:g} s for a "
      "sign of life"
    )
    began = time.monotonic()
    while time.monotonic() - began < STALE_SECONDS:
      time.sleep(min(2.0, STALE_SECONDS / 10))
      found = self._store.read(LEASE)
      if found is None:
        return False
      if found[1] != tag:
        raise WorkdirError(
          f"{self._store.address} is in use by {_name(_parsed(found[0]))}; wait for it or give "
          "another --workdir"
        )
    return True


def _clocks() -> tuple[float, float]:
  """One is never set; the other goes on while the machine sleeps."""
  return time.monotonic(), time.time()


def _parsed(content: bytes) -> Any:
  try:
    found = json.loads(content)
  except ValueError:
    found = None
  return found if isinstance(found, dict) else {}


def _name(holder: Json) -> str:
  if not holder:
    return "another process"
  return f"process {holder.get('pid')} on {holder.get('host')} (last sign {holder.get('time')})"


def _machine() -> str:
  """This boot of this machine, and the namespace of process numbers: containers have their own."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _lives(pid: Any) -> bool:
  """Whether a process of this machine lives; where that cannot be told, yes."""
  if not _machine() or not isinstance(pid, int) or pid <= 0:
    return True
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    return True
  return pid != os.getpid()  # this process holds none yet
