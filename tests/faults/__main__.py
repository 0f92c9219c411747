"""The fault suite: python -m tests.faults --rounds=20 --out=table.md [--only=NAME] [--seed=0].

Every round is a line in table.jsonl, next to the table; the same command continues after the
existing ones. Runs that the rounds share are made once, in table.work/, which must be removed after
the program was changed. Exit code 1: a round failed; its folder is kept in table.work/rounds/.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
# Before JAX is imported, here and in the processes to come.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from absl import logging  # noqa: E402  (the environment comes first)

from tests.faults.faults import FAULTS  # noqa: E402
from tests.faults.processes import EVERY  # noqa: E402
from tests.faults.trial import Result, Suite, Trial  # noqa: E402

HEADER = (
  *("fault", "rounds", "told", "harmless", "silent", "steps lost (most)"),
  *("seconds to recover (median)", "same end, to the bit"),
)


def table(results: list[Result]) -> str:
  """One row per fault, in the order of FAULTS."""
  by_fault = collections.defaultdict(list)
  for result in results:
    by_fault[result.fault].append(result)
  rows = [HEADER, ("---",) * len(HEADER)]
  for fault in FAULTS:
    if found := by_fault[fault]:
      outcomes = collections.Counter(result.outcome for result in found)
      silent = sum("SILENT" in result.problem for result in found)
      seconds = statistics.median(result.seconds for result in found)
      same = f"{sum(result.same for result in found)} of {len(found)}"
      cells = (fault, len(found), outcomes["told"], outcomes["harmless"] - silent, silent)
      rows.append((*cells, max(result.lost for result in found), f"{seconds:.0f}", same))
  return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def read(path: pathlib.Path) -> list[Result]:
  lines = path.read_text().splitlines() if path.exists() else []
  return [Result(**json.loads(line)) for line in lines]


def main() -> int:
  parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
  parser.add_argument("--rounds", type=int, default=1, help="of every fault")
  parser.add_argument("--round", type=int, help="this one again, alone")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("faults.md"))
  parser.add_argument("--only", action="append", choices=list(FAULTS), help="of FAULTS; may recur")
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  logging.set_verbosity(logging.ERROR)  # of Orbax, which is used without a manager here

  lines = flags.out.with_suffix(".jsonl")
  suite = Suite(flags.out.with_suffix(".work"))
  results = read(lines)
  todo = [(flags.round, fault) for fault in flags.only or FAULTS]
  if flags.round is None:
    # Every fault starts with another number, and so another kind: few rounds cover all kinds.
    firsts = {fault: i for i, fault in enumerate(FAULTS) if fault in (flags.only or FAULTS)}
    todo = [(i + first, fault) for i in range(flags.rounds) for fault, first in firsts.items()]
    known = {(result.round, result.fault, result.seed) for result in results}
    todo = [each for each in todo if (*each, flags.seed) not in known]
  failed = 0
  for i, (number, fault) in enumerate(todo, 1):
    began = time.monotonic()
    result = Trial(suite, fault, number, flags.seed).run()
    failed += bool(result.problem)
    how = f"{result.outcome}, {result.lost} steps lost" if not result.problem else "FAILED"
    print(
      f"{i}/{len(todo)} · {fault} · {result.kind} · {result.hit} · {result.codes} · {how} · "
      f"{time.monotonic() - began:.0f} s",
      flush=True,
    )
    if result.problem:
      print(
        f"  {result.problem}\n  again: python -m tests.faults --only={fault!r} --round={number} "
        f"--seed={flags.seed} --out={flags.out}",
        flush=True,
      )
    if flags.round is None:
      results.append(result)
      with lines.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
      flags.out.write_text(f"A checkpoint every {EVERY} steps.\n\n" + table(results))
  print(flags.out.read_text() if flags.out.exists() else "")
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(main())
