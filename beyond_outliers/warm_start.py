"""The parameters of another run for a run to begin with, whatever the recipes of the two."""
from __future__ import annotations

from typing import Any

import jax
import numpy as np

from beyond_outliers import checkpoint, config, quant, runs, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.model import transformer


def params(c: config.Config, mesh: jax.sharding.Mesh) -> tuple[int, Any]:
  """(step, parameters) of the newest intact checkpoint in `c.warm_start`, placed on the mesh.

  Scales that the other run learned are among them where it followed the same rules; otherwise they stay behind.
  Errors: ConfigError when there is no run or checkpoint, or when it is of another model."""
  try:
    source = runs.open(c.warm_start)
    theirs = source.config
    _check_equal(c.warm_start, transformer.shapes(transformer.Transformer(theirs.model)),
                 transformer.shapes(transformer.Transformer(c.model)))
    shardings = mesh_lib.shardings(transformer.boxed_shapes(source.model), mesh)
    step, found = checkpoint.Checkpoints(writers.Workdir(c.warm_start).checkpoints, read_only=True).restore_params(
      mesh_lib.placed(transformer.shapes(source.model), shardings))
  except (checkpoint.CheckpointError, writers.WorkdirError) as error:
    raise config.ConfigError(f"warm_start = {c.warm_start!r}: {error}") from None
  alike = quant.recipes.from_config(theirs.quant) == quant.recipes.from_config(c.quant)
  return step, found if alike else transformer.without_own(c.model, found)


def _check_equal(path: str, theirs: Any, ours: Any) -> None:
  """Errors: ConfigError with the first parameter that is not the same."""
  def leaves(tree):
    return {mesh_lib.path_of(keys): (x.shape, str(np.dtype(x.dtype))) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}

  have, want = leaves(theirs), leaves(ours)
  for name in sorted(have.keys() | want.keys()):
    if have.get(name) != want.get(name):
      raise config.ConfigError(f"warm_start = {path!r}: params/{name} is {have.get(name, 'missing')} in that run and "
                               f"{want.get(name, 'missing')} in this one; take a run of the same model")
