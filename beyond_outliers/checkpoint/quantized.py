"""Quantized models as Orbax checkpoints, in the form of quant/storage.py."""

from __future__ import annotations

import numpy as np
import orbax.checkpoint as ocp

from beyond_outliers import config, quant
from beyond_outliers import params as params_lib
from beyond_outliers.checkpoint.reading import check_readable, reason
from beyond_outliers.errors import CheckpointError
from beyond_outliers.types import PathLike
from beyond_outliers.workdir import FolderPath


def save_quantized(q: quant.QuantizedModel, directory: PathLike) -> None:
  """`q.save` by Orbax: the items `tensors` and `description`, in the form of quant/storage.py.

  Errors: CheckpointError, also when there is something at the directory."""
  directory = FolderPath(directory).absolute()
  if directory.exists():
    raise CheckpointError(f"{directory}: is there already; remove it or choose another")
  tensors, description = quant.storage.pack_model(q)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(
      directory,
      args=ocp.args.Composite(
        tensors=ocp.args.StandardSave(params_lib.tree_of(tensors)),
        description=ocp.args.JsonSave(description),
      ),
    )
  check_readable(directory, "tensors", params_lib.shapes_by_path(tensors), "description")


def load_quantized(directory: PathLike) -> quant.QuantizedModel:
  """The model that `save_quantized` wrote, bit by bit, on the default device.

  Errors: CheckpointError, ConfigError."""
  directory = FolderPath(directory).absolute()
  if not (directory / "description").exists():
    raise CheckpointError(f"{directory}: no quantized model; give what save_quantized wrote")
  args = ocp.args.Composite(tensors=ocp.args.StandardRestore(), description=ocp.args.JsonRestore())
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    try:
      items = reader.restore(directory, args=args)
    except Exception as error:  # Orbax raises all kinds for files that it cannot read
      raise CheckpointError(f"{directory} is damaged: {reason(error)}; copy it again") from error
  if problem := config.files.misfit(items.description, quant.storage.DESCRIPTION_KINDS):
    raise CheckpointError(f"{directory / 'description'}: {problem}; copy it again")
  tensors = params_lib.leaves_by_path(items.tensors)
  return quant.ptq.restored({k: np.asarray(x) for k, x in tensors.items()}, items.description)
