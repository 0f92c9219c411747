"""Temporary checkpoints: saved by time, and kept until the next one is.

Averages, evaluation jobs and other readers do not see them: when they come and go is not a matter
of the run, but of the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from etils import epath
from orbax.checkpoint import checkpoint_managers

TEMPORARY = "temporary"  # item that no other checkpoint has


def is_temporary(checkpoint: epath.Path) -> bool:
  return (checkpoint / TEMPORARY).is_dir()


@dataclasses.dataclass
class ReplaceTemporary(checkpoint_managers.PreservationPolicy):
  """The newest checkpoint is preserved, whatever it is, no other temporary one, and of those that
  are not what `policy` does. temporary: the steps of those that are."""

  policy: checkpoint_managers.PreservationPolicy
  temporary: set[int]

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    lasting = [each for each in checkpoints if each.step not in self.temporary]
    verdicts = self.policy.should_preserve(lasting, context=context)
    kept = {each.step for each, keep in zip(lasting, verdicts, strict=True) if keep}
    return [each.step in kept or each is checkpoints[-1] for each in checkpoints]
