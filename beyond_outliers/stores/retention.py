"""Which files of its store a run's folder has given up, and which it has lost.

A file that is gone from the folder may have been deleted by the run, or by whoever cleans a disk.
It is deleted in the store only where the folder shows that it was the run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from beyond_outliers.stores.index import Stamp, step_of, steps_named

ASIDE = re.compile(r"aside-[^/]+/((?:checkpoints|eval)/.+|status\.json)")  # by train/rewind.py
DAMAGED = re.compile(r"checkpoints/damaged-(\d+)-[^/]+/(.+)")  # by checkpoint/checkpoints.py


def place_of(name: str) -> str:
  """The name that a file had before a run set it aside; of any other, nothing."""
  if match := ASIDE.match(name):
    return match[1]
  match = DAMAGED.match(name)
  return f"checkpoints/{match[1]}/{match[2]}" if match else ""


def is_set_aside(name: str) -> bool:
  """Whether it is in a folder of what a run set aside, which readers do not need."""
  return name.startswith("aside-") or bool(DAMAGED.match(name))


def set_aside(
  found: Mapping[str, Stamp], known: Mapping[str, Stamp], whole: Collection[int]
) -> list[str]:
  """Names of known files that the folder has set aside, and no longer has in their place.

  whole: steps of the checkpoints that are; without one, the store's copy of a damaged checkpoint
  may be the last."""
  aside = {
    (place, stamp)
    for name, stamp in found.items()
    if (place := place_of(name)) and (whole or not DAMAGED.match(name))
  }
  return [name for name, stamp in known.items() - found.items() if (name, stamp) in aside]


def superseded(found: Mapping[str, Stamp], known: Mapping[str, Stamp], newest: int) -> list[str]:
  """Names of known files of checkpoints of which nothing is left, and that are older than another.
  A checkpoint that lacks only some of its files is not among them: it is being deleted, or damaged.

  newest: step of the newest whole checkpoint that the store has."""
  here = steps_named(found)
  return [
    name
    for name in known
    if (step := step_of(name)) is not None and step < newest and step not in here
  ]


def lost(found: Mapping[str, Stamp], known: Collection[str]) -> str:
  """What the folder has lost of a run, though no run deletes it; empty if nothing."""
  if "config.json" in known and "config.json" not in found:
    return "config.json"
  here = steps_named(found)
  damaged = {int(match[1]) for match in map(DAMAGED.match, found) if match}
  gone = [step for step in steps_named(known) - here - damaged if step > max(here, default=-1)]
  return f"checkpoint {max(gone)}" if gone else ""
