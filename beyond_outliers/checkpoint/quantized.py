"""Quantized models as Orbax checkpoints, in the format of quant/storage.py."""

from __future__ import annotations

import numpy as np
import orbax.checkpoint as ocp

from beyond_outliers import params as params_lib
from beyond_outliers import quant
from beyond_outliers.checkpoint import digests
from beyond_outliers.checkpoint.reading import check_readable, reason
from beyond_outliers.config.files import misfit
from beyond_outliers.config.sums import folder_mismatch
from beyond_outliers.errors import CheckpointError
from beyond_outliers.types import PathLike
from beyond_outliers.workdir import FolderPath, write_sums


def save_quantized(q: quant.QuantizedModel, directory: PathLike) -> None:
  """Saves a quantized model with Orbax: the items `tensors` and `description` in the format of
  quant/storage.py, with digests and sums as in a run's checkpoint.

  Errors: CheckpointError, also when the directory already exists."""
  directory = FolderPath(directory).absolute()
  if directory.exists():
    raise CheckpointError(f"{directory}: already exists; remove it or choose another")
  tensors, description = quant.storage.pack_model(q)
  texts = {"description": description}
  texts["digests"] = digests.record(digests.examine(tensors).digests, texts)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(
      directory,
      args=ocp.args.Composite(
        tensors=ocp.args.StandardSave(params_lib.tree_of(tensors)),
        **{name: ocp.args.JsonSave(text) for name, text in texts.items()},
      ),
    )
  check_readable(directory, "tensors", params_lib.shapes_by_path(tensors), texts)
  write_sums(directory)


def load_quantized(directory: PathLike) -> quant.QuantizedModel:
  """The model that `save_quantized` wrote, bit for bit, on the default device.

  Errors: CheckpointError, also if digests or sums, which older models lack, do not match;
    ConfigError."""
  directory = FolderPath(directory).absolute()
  if not (directory / "description").exists():
    raise CheckpointError(
      f"{directory}: not a quantized model; give a folder that save_quantized wrote"
    )
  damaged = f"{directory} is damaged: {{}}; copy it again".format
  if problem := folder_mismatch(directory):
    raise CheckpointError(damaged(problem))
  texts = ["description", *(["digests"] if (directory / "digests").exists() else [])]
  args = ocp.args.Composite(
    tensors=ocp.args.StandardRestore(), **{name: ocp.args.JsonRestore() for name in texts}
  )
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    try:
      items = reader.restore(directory, args=args)
    except Exception as error:  # Orbax raises all kinds for files that it cannot read
      raise CheckpointError(damaged(reason(error))) from error
  tensors, description = params_lib.leaves_by_path(items.tensors), items.description
  if "digests" in texts:
    problem = misfit(items.digests, digests.DIGEST_KINDS) or digests.difference(
      items.digests, digests.examine(tensors).digests, {"description": description}
    )
    if problem:
      raise CheckpointError(damaged(f"{problem} is not what was saved: its digest differs"))
  if problem := misfit(description, quant.storage.DESCRIPTION_KINDS):
    raise CheckpointError(f"{directory / 'description'}: {problem}; copy it again")
  return quant.ptq.restored({k: np.asarray(x) for k, x in tensors.items()}, description)
