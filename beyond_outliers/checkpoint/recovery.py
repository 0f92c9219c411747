"""Which checkpoint a run goes on from: the newest that can be read, and what becomes of others.

A checkpoint is damaged if its files do not match their sums, if it has no sums and cannot be read,
if by its digests it does not hold what was saved, or if that is not finite. One that matches its
sums but cannot be read now, because memory or descriptors ran out or a file system does not answer,
is not damaged, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from etils import epath

from beyond_outliers import mesh
from beyond_outliers.checkpoint import digests
from beyond_outliers.checkpoint.reading import read_run, read_text, reason
from beyond_outliers.config.files import misfit
from beyond_outliers.errors import CheckpointError
from beyond_outliers.workdir import SUMS, identity_of, mismatch

Found = TypeVar("Found")

# Errors of the system that say nothing about the file itself.
SHORT = (
  *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE),
  *(errno.EACCES, errno.EPERM),
)
SHORT_OF = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")  # the same, of TensorStore


class UnusableError(Exception):
  """Contents that could be read, but that a run cannot resume from."""


def newest_intact(
  directory: epath.Path,
  steps: list[int],
  read: Callable[[int], Found],
  remedy: str,
  *,
  verify: bool,
) -> tuple[int, Found, dict[int, str]]:
  """(step, what `read` made of it, {newer step: its damage}) of the newest of `steps`, ascending.

  Every process calls this: what one of them cannot read, all of them skip. remedy: for the message,
  where all are damaged.
  Errors: CheckpointError where all are damaged, or one could not be read now."""
  damaged: dict[int, str] = {}
  for step in steps[::-1]:
    found = None
    damage, problem = _compare(directory / str(step), verify)
    try:
      found = None if damage or problem else read(step)
    except CheckpointError:  # another structure is no damage
      raise
    except Exception as error:  # Orbax raises all kinds for files that it cannot read
      if isinstance(error, UnusableError) or not _is_sound(directory / str(step), error, verify):
        damage = reason(error)
      else:
        problem = reason(error)
    if mesh.on_any_process(bool(problem)):
      raise CheckpointError(
        f"{directory / str(step)} could not be read now ({problem or 'by another process'}), but "
        "is not damaged, and nothing was changed: free what has run out, and give the same command"
      )
    if not mesh.on_any_process(bool(damage)):
      assert found is not None
      return step, found, damaged
    damaged[step] = damage or "another process cannot read it"
  each = "; ".join(f"{directory / str(step)} is damaged: {why}" for step, why in damaged.items())
  lead = "every checkpoint is damaged: " if len(damaged) > 1 else ""
  raise CheckpointError(f"{lead}{each}; {remedy}")


def compare_contents(
  checkpoint: epath.Path, contents: digests.Contents, texts: Mapping[str, Any] | None = None
) -> None:
  """Compares what was read with what was to be written. texts: as of `digests.difference`.

  Errors: UnusableError."""
  recorded: Any = None
  with contextlib.suppress(ValueError):
    recorded = read_text(checkpoint / "digests")
  if misfit(recorded, digests.DIGEST_KINDS):
    raise UnusableError("its digests cannot be read")
  if recorded.get("step", int(checkpoint.name)) != int(checkpoint.name):  # the first had none
    raise UnusableError(f"it was saved as {recorded['step']}, and renamed since")
  if name := digests.difference(recorded, contents.digests, texts):
    raise UnusableError(f"{name} is not what was saved: its digest differs")


def check_run(checkpoint: epath.Path, identity: str) -> None:
  """Refusal of a checkpoint of another run than that of this identity; an empty one allows all.

  Errors: CheckpointError; UnusableError where its record of the run cannot be read."""
  try:
    record: Any = read_run(checkpoint)
  except ValueError:
    raise UnusableError("its record of the run cannot be read") from None
  if not identity or misfit(record, {"manifest": dict}):  # the first told less
    return
  if (found := identity_of(record["manifest"])) != identity:
    raise CheckpointError(
      f"{checkpoint} belongs to the run {found[:12]}, and its folder belonged to {identity[:12]} "
      "when it was opened; if another training has begun there, give the same command again"
    )


def _compare(checkpoint: epath.Path, verify: bool) -> tuple[str, str]:
  """(difference of a checkpoint from its sums, why they could not be compared), as process 0 finds
  it: all or none go on to read it together."""
  damage, problem = "", ""
  if verify and jax.process_index() == 0:
    try:
      damage = mismatch(checkpoint)
    except OSError as error:
      problem = reason(error)
  return mesh.from_first(damage), mesh.from_first(problem)


def _is_sound(checkpoint: epath.Path, error: Exception, verify: bool) -> bool:
  """Whether a checkpoint whose reader raised is none the worse for it."""
  if verify and (checkpoint / SUMS).exists():
    return True  # the sums hold
  short = isinstance(error, MemoryError) or any(word in str(error) for word in SHORT_OF)
  return short or (isinstance(error, OSError) and error.errno in SHORT)
