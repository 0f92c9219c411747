"""Which checkpoints of a run are kept: the last checkpoint.keep, and every checkpoint.keep_every.

Temporary checkpoints, saved by the clock, are kept until the next save. Averages, evaluation jobs
and other readers do not see them, since their existence depends on the clock and not on the run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from etils import epath

from beyond_outliers import config

TEMPORARY = "temporary"  # the item that marks a temporary checkpoint


def is_temporary(checkpoint: epath.Path) -> bool:
  return (checkpoint / TEMPORARY).is_dir()


def delete_replaced(proven: epath.Path, steps: Sequence[int], options: config.Checkpoint) -> None:
  """Deletes those of `steps` (ascending) that the checkpoint `proven` replaces. It must be known to
  be readable: before that, the older ones may be all there is."""
  lasting = [step for step in steps if not is_temporary(proven.parent / str(step))]
  every = [step for step in lasting if options.keep_every and step % options.keep_every == 0]
  for step in set(steps) - {int(proven.name), *lasting[-options.keep :], *every}:
    with contextlib.suppress(FileNotFoundError):  # someone else may be deleting it, too
      (proven.parent / str(step)).rmtree()
