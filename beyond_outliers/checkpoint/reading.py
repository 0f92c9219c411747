"""What Orbax finds in a checkpoint that was just written, and errors of its readers in one line."""

from __future__ import annotations

import orbax.checkpoint as ocp
from etils import epath

from beyond_outliers import params as params_lib
from beyond_outliers.errors import CheckpointError


def check_readable(path: epath.Path, item: str, shapes: params_lib.Shapes, *texts: str) -> None:
  """Refusal of what was just saved where Orbax's own reader does not find it in the files: every
  array of `item`, without the values, and the items `texts`, which are JSON."""
  handler, problem = ocp.StandardCheckpointHandler(), ""
  try:
    found = params_lib.shapes_by_path(handler.metadata(path / item).tree)
    if name := params_lib.first_difference(found, shapes):
      problem = f"{name} is {found.get(name, 'missing')}, not {shapes.get(name)}"
    for text in texts:
      ocp.JsonCheckpointHandler().restore(path / text)
  except Exception as error:  # Orbax and TensorStore raise all kinds
    problem = reason(error)
  if problem:
    raise CheckpointError(
      f"{path}: was saved, and cannot be read back ({problem}); take a folder on another disk"
    )


def reason(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]
