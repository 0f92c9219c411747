"""Comparison of two commits by all that they compute: python .ci/same.py A [B].

Each commit trains tiny models with every optimizer, in full precision and under QuEST, on one and
on eight simulated devices, and quantizes one of them after training. Compared are, part by part:

  workdir  config.json, the names of the files, where the data stand
  metrics  metrics.jsonl without times and rates
  arrays   every array of the last checkpoint with its path
  eval     names and contents of the files in eval/
  hlo      the programs as XLA optimized them, without whatever is only a name

The code is driven by its commands alone, so that any of its modules may move. B is the working
tree by default. What a commit gave is kept in .guard/.
Exit code: 0 equal, 1 different, 2 a command failed.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import sys

import tiny_runs

PARTS = ("workdir", "metrics", "arrays", "eval", "hlo")
SHOWN = 6  # differences told of a run's part


def differences(part: str, a, b) -> list[str]:
  """What differs between a part of two commits' runs, a line each."""
  if part == "hlo":
    return different_programs(a, b)
  found = [f"{name}: only in {'A' if name in a else 'B'}" for name in sorted(a.keys() ^ b.keys())]
  for name in (name for name in a if name in b):
    x, y = a[name], b[name]
    if part == "arrays":
      if (x.dtype, x.shape) != (y.dtype, y.shape):
        found.append(f"{name}: {x.dtype}{list(x.shape)} | {y.dtype}{list(y.shape)}")
      elif x.tobytes() != y.tobytes():
        largest = abs(x.astype("float64") - y.astype("float64")).max()
        found.append(f"{name}: largest |difference| {largest:.3g}")
    elif x != y:
      found.append(f"{name}: {x!r} | {y!r}")
  return found


def different_programs(a: list, b: list) -> list[str]:
  """Programs of one commit alone. Those of one name, or else of one place, are compared."""

  def surplus(own: list, others: list) -> list:
    count = collections.Counter(text for _, text in own)
    count -= collections.Counter(text for _, text in others)
    return [(name, text) for name, text in own if count[text] > 0 and not count.subtract([text])]

  left, right = surplus(a, b), surplus(b, a)
  found = []
  while left and right:
    name, text = left.pop(0)
    other = next((pair for pair in right if pair[0] == name), right[0])
    right.remove(other)
    pairs = itertools.zip_longest(text.split("\n"), other[1].split("\n"), fillvalue="(no line)")
    line, (x, y) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    found += [f"{name} | {other[0]}, from line {line} on:", f"  A {x[:300]}", f"  B {y[:300]}"]
  found += [f"{name}: a program only in A" for name, _ in left]
  return found + [f"{name}: a program only in B" for name, _ in right]


def main() -> int:
  parser = argparse.ArgumentParser(description="Shows whether two commits compute the same.")
  parser.add_argument("a", metavar="A", help="a git revision")
  parser.add_argument("b", metavar="B", nargs="?", default=".", help="another, or . (what is here)")
  parser.add_argument("--only", help="as in soap,muon; by default all optimizers of both commits")
  parser.add_argument("--parts", default=",".join(PARTS), help="compared: " + ",".join(PARTS))
  parser.add_argument("--quick", action="store_true", help="on one device, without the PTQ job")
  parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, a core each")
  args = parser.parse_args()
  of_a, of_b = (tiny_runs.optimizers_of(revision) for revision in (args.a, args.b))
  both = [name for name in of_a if name in of_b]
  optimizers, parts = args.only.split(",") if args.only else both, args.parts.split(",")
  if unknown := {*optimizers} - {*both} | {*parts} - {*PARTS}:
    parser.error(f"{unknown} are none of {both}, which both commits have, and {PARTS}")
  if alone := {*of_a} ^ {*of_b}:
    print(f"not compared, since one commit lacks them: {', '.join(sorted(alone))}\n")
  runs = tiny_runs.plan(optimizers, args.quick)
  a, b = (tiny_runs.results(revision, runs, args.jobs) for revision in (args.a, args.b))
  equal: dict[str, list[bool]] = {part: [] for part in parts}
  for run, part in itertools.product(sorted(a), parts):
    if part not in a[run]:
      continue
    found = differences(part, a[run][part], b[run][part])
    equal[part].append(not found)
    print(f"{run:<14} {part:<8} {'DIFFERENT' if found else f'equal ({len(a[run][part])})'}")
    print("".join(f"    {line}\n" for line in found[:SHOWN]), end="")
    if len(found) > SHOWN:
      print(f"    ... and {len(found) - SHOWN} more")
  print()
  for part, each in equal.items():
    print(f"{part}: equal in {sum(each)} of {len(each)} runs" if each else f"{part}: not compared")
  return 0 if all(itertools.chain(*equal.values())) else 1


if __name__ == "__main__":
  sys.exit(main())
