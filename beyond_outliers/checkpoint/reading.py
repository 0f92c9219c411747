"""Checks that Orbax finds in a checkpoint what should be there; and its reading errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from beyond_outliers import params as params_lib
from beyond_outliers.config.sums import digest
from beyond_outliers.errors import CheckpointError, remedy_for
from beyond_outliers.optim import blocks
from beyond_outliers.types import Json

STEP = re.compile(r"0|[1-9][0-9]*")  # the name of a committed checkpoint's folder


def committed_steps(directory: epath.Path) -> list[int]:
  """Steps of the checkpoints in a folder; its other folders, such as a copy `old_24`, don't count.

  Errors: CheckpointError for a folder that cannot be listed now."""
  try:
    found = list(directory.iterdir()) if directory.is_dir() else []
  except FileNotFoundError:  # removed meanwhile
    return []
  except OSError as error:
    problem = f"{error.strerror}; {remedy_for(error, 'give the folder of a run')}"
    raise CheckpointError(f"{directory}: {problem}") from None
  return [int(path.name) for path in found if STEP.fullmatch(path.name) and path.is_dir()]


def check_readable(
  path: epath.Path, item: str, shapes: params_lib.Shapes, texts: Mapping[str, Any]
) -> None:
  """Refuses a checkpoint just saved if Orbax's own reader does not find in its files every array of
  `item` (its values are not read) and the JSON items `texts`. Errors: CheckpointError."""
  handler, problem = ocp.StandardCheckpointHandler(), ""
  try:
    found = params_lib.shapes_by_path(handler.metadata(path / item).tree)
    if name := params_lib.first_difference(found, shapes):
      problem = f"{name} is {found.get(name, 'missing')}, not {shapes.get(name)}"
    for name, text in texts.items():
      if digest(read_text(path / name)) != digest(text):
        problem = f"{name} is not what was saved"
  except Exception as error:  # Orbax and TensorStore raise all kinds
    problem = reason(error)
  if problem:
    raise CheckpointError(
      f"{path}: was saved, but cannot be read back ({problem}); use a folder on another disk"
    )


def check_structure(path: epath.Path, stored: Any, state: Any, part: str = "") -> None:
  """Refuses a checkpoint whose arrays (all, or those below `part`) have other names, shapes or
  dtypes than the state's: Orbax would silently cast and cut them. Errors: CheckpointError."""
  have, want = params_lib.shapes_by_path(stored, part), params_lib.shapes_by_path(state, part)
  # Blocks of optimizer state are padded to a multiple of the devices: the padding may differ.
  for name in have.keys() & want.keys() & blocks.block_paths(state):
    have[name] = (want[name][0][:1] + have[name][0][1:], have[name][1])
  if name := params_lib.first_difference(have, want):
    raise CheckpointError(
      f"{path}: {name} is {have.get(name, 'missing')} in the checkpoint and "
      f"{want.get(name, 'missing')} in this run; was the model or optimizer changed?"
    )


def read_text(item: epath.Path) -> Any:
  """The content of a JSON item. Errors: ValueError, OSError."""
  return ocp.JsonCheckpointHandler().restore(item)


def read_run(checkpoint: epath.Path) -> Json | None:
  """What a checkpoint says about its run; None for checkpoints from before it was stored.

  Errors: those of `read_text`."""
  return read_text(checkpoint / "run") if (checkpoint / "run").is_dir() else None


def reason(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]
