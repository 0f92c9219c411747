"""The parameters of another run for a run to begin with, whatever the recipes of the two."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from beyond_outliers import checkpoint, config, quant, runs
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.model import transformer

# What a model may change between two runs and still compute the same of its parameters, up to
# rounding.
MAY_DIFFER = ("init_std", "dtype", "attention", "unroll", "remat")


def params(c: config.Config, mesh: jax.sharding.Mesh) -> tuple[int, Any]:
  """(step, parameters) of the newest intact checkpoint in `c.warm_start`, placed on the mesh.

  Scales that the other run learned are among them where it followed the same rules; otherwise they
  stay behind.
  Errors: ConfigError when there is no run or checkpoint, or when it is of another model."""
  try:
    source = runs.open(c.warm_start)
    theirs = source.config
    _check_same_model(c.warm_start, theirs.model, c.model)
    step, found = source.restore(mesh)
  except (checkpoint.CheckpointError, workdir_lib.WorkdirError) as error:
    raise config.ConfigError(f"warm_start = {c.warm_start!r}: {error}") from None
  alike = quant.recipes.from_config(theirs.quant) == quant.recipes.from_config(c.quant)
  return step, found if alike else transformer.without_dot_general_params(c.model, found)


def _check_same_model(path: str, theirs: config.Model, ours: config.Model) -> None:
  for field in dataclasses.fields(config.Model):
    was, now = getattr(theirs, field.name), getattr(ours, field.name)
    if field.name not in MAY_DIFFER and was != now:
      raise config.ConfigError(
        f"warm_start = {path!r}: model.{field.name} is {was!r} in that run and {now!r} in this "
        "one; "
        "take a run of the same model"
      )
