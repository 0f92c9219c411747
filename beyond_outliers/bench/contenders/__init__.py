"""Programs that are timed against each other: each repeats its work whenever it is asked to.

Only the standard library is imported, for peers in interpreters without our dependencies.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def serve(work: Callable[[], float]) -> None:
  """Does it once, with all that the first time needs, and again for every line of stdin. Prints
  `once`'s figures of each time as a line of JSON.

  work: waits for what it does; -> a number that all who do the same work must agree on."""
  print(json.dumps(once(work)), flush=True)
  for _ in sys.stdin:
    print(json.dumps(once(work)), flush=True)


def once(work: Callable[[], float]) -> dict[str, float]:
  """Seconds, CPU seconds, what came of it, and the most memory that the process has held so far, in
  bytes."""
  start, cpu_start = time.perf_counter(), time.process_time()
  result = work()
  return {
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - cpu_start,
    "memory_bytes": peak_memory(),
    "result": result,
  }


def peak_memory() -> int:
  """The most that this process has held, in bytes."""
  if os.path.exists("/proc/self/status"):  # ru_maxrss has what the process held that started it
    with open("/proc/self/status") as lines:
      return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024
