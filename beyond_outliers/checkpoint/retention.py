"""Which checkpoints of a run are kept: the newest, and those of checkpoint.keep and .keep_every.

Temporary checkpoints, saved by time, are kept until the next save. Averages, evaluation jobs and
other readers do not see them, since when they exist depends on the clock and not on the run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from etils import epath

from beyond_outliers import config

TEMPORARY = "temporary"  # item that no other checkpoint has


def is_temporary(checkpoint: epath.Path) -> bool:
  return (checkpoint / TEMPORARY).is_dir()


def delete_replaced(proven: epath.Path, steps: Sequence[int], options: config.Checkpoint) -> None:
  """Deletes those of `steps`, oldest first, that `proven`, a checkpoint that can be read back,
  takes the place of. Before it is proven nothing may be: they may be all that there is."""
  lasting = [step for step in steps if not is_temporary(proven.parent / str(step))]
  every = [step for step in lasting if options.keep_every and step % options.keep_every == 0]
  for step in set(steps) - {int(proven.name), *lasting[-options.keep :], *every}:
    with contextlib.suppress(FileNotFoundError):  # a person deletes it, too
      (proven.parent / str(step)).rmtree()
