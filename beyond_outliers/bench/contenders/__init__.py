"""Programs that are timed beside each other: each takes one step whenever it is told to.

Of the standard library alone, for peers run in interpreters that may have nothing of ours.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable


def serve(step: Callable[[], float]) -> None:
  """Answers every line of stdin with one step, waited for: a line of JSON with its seconds, CPU
  seconds, loss, and the most memory that the process has held so far, in bytes.

  step: -> loss. One is taken before the first line, which says that it is ready."""
  step()  # which compiles, and touches memory for the first time
  print("ready", flush=True)
  for _ in sys.stdin:
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = step()
    figures = {
      "seconds": time.perf_counter() - start,
      "cpu_seconds": time.process_time() - cpu_start,
      "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      * (1 if sys.platform == "darwin" else 1024),
      "loss": loss,
    }
    print(json.dumps(figures), flush=True)
