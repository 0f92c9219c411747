"""Programs that are timed against each other: each repeats its work on request.

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
  """Does the work once, with all that the first time takes, and again for every line of stdin.
  Prints the figures of `once` for each time as a line of JSON.

  work: returns, after it has finished, a number on which all contenders must agree."""
  print(json.dumps(once(work)), flush=True)
  for _ in sys.stdin:
    print(json.dumps(once(work)), flush=True)


def once(work: Callable[[], float]) -> dict[str, float]:
  """Does the work once; returns seconds, CPU seconds, the work's result, and the process's peak
  memory so far in bytes."""
  start, cpu_start = time.perf_counter(), time.process_time()
  result = work()
  return {
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - cpu_start,
    "memory_bytes": peak_memory(),
    "result": result,
  }


def peak_memory() -> int:
  """Peak memory of this process, in bytes."""
  if os.path.exists("/proc/self/status"):  # ru_maxrss would include the parent process's memory
    with open("/proc/self/status") as lines:
      return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024
