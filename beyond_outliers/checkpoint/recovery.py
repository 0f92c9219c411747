"""Which checkpoint a run resumes from (the newest intact one), and what happens to the others.

A checkpoint is damaged if its files do not match their sums, if it has no sums and cannot be read,
if its contents do not match their digests, or if they are not finite. If its sums match but it
cannot be read now, for lack of memory, file descriptors or a responding file system, it is not
damaged, and is left alone.
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

# System errors that say nothing about a file's contents.
SHORT = (
  *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE),
  *(errno.EACCES, errno.EPERM),
)
SHORT_OF = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")  # the same, in TensorStore's messages


class UnusableError(Exception):
  """Contents that could be read, but that a run cannot continue from."""


def newest_intact(
  directory: epath.Path,
  steps: list[int],
  read: Callable[[int], Found],
  remedy: str,
  *,
  verify: bool,
) -> tuple[int, Found, dict[int, str]]:
  """(step, result of `read`, {newer step: its damage}) for the newest intact one of `steps`, which
  are ascending.

  All processes must call this: if one cannot read a checkpoint, none of them uses it.
  remedy: the advice if all are damaged.
  Errors: CheckpointError if all are damaged, or if one cannot be read now."""
  damaged: dict[int, str] = {}
  for step in steps[::-1]:
    found = None
    damage, problem = _compare(directory / str(step), verify)
    try:
      found = None if damage or problem else read(step)
    except CheckpointError:  # a different structure is not damage
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
  """Compares what was read with what was meant to be written. texts: as in `digests.difference`.

  Errors: UnusableError."""
  recorded: Any = None
  with contextlib.suppress(ValueError):
    recorded = read_text(checkpoint / "digests")
  if misfit(recorded, digests.DIGEST_KINDS):
    raise UnusableError("its digests cannot be read")
  if recorded.get("step", int(checkpoint.name)) != int(checkpoint.name):  # early ones have no step
    raise UnusableError(f"it was saved as {recorded['step']}, and renamed since")
  if name := digests.difference(recorded, contents.digests, texts):
    raise UnusableError(f"{name} is not what was saved: its digest differs")


def check_run(checkpoint: epath.Path, identity: str) -> None:
  """Refuses a checkpoint of another run than the one with this identity; "" allows any.

  Errors: CheckpointError; UnusableError if the checkpoint's record of its run cannot be read."""
  try:
    record: Any = read_run(checkpoint)
  except ValueError:
    raise UnusableError("its record of the run cannot be read") from None
  if not identity or misfit(record, {"manifest": dict}):  # early records have no manifest
    return
  if (found := identity_of(record["manifest"])) != identity:
    raise CheckpointError(
      f"{checkpoint} belongs to the run {found[:12]}, and its folder belonged to {identity[:12]} "
      "when it was opened; if another training has begun there, give the same command again"
    )


def _compare(checkpoint: epath.Path, verify: bool) -> tuple[str, str]:
  """(how a checkpoint differs from its sums, why that could not be determined), as found by process
  0, so that all processes or none go on to read it."""
  damage, problem = "", ""
  if verify and jax.process_index() == 0:
    try:
      damage = mismatch(checkpoint)
    except OSError as error:
      problem = reason(error)
  return mesh.from_first(damage), mesh.from_first(problem)


def _is_sound(checkpoint: epath.Path, error: Exception, verify: bool) -> bool:
  """Whether a checkpoint is undamaged although reading it raised `error`."""
  if verify and (checkpoint / SUMS).exists():
    return True  # the sums hold
  short = isinstance(error, MemoryError) or any(word in str(error) for word in SHORT_OF)
  return short or (isinstance(error, OSError) and error.errno in SHORT)
