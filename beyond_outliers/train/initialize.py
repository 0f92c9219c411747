"""Initial state of a run: its newest intact checkpoint, another run's parameters, or new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from beyond_outliers import config, quant, runs
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.config.checks import require
from beyond_outliers.errors import CheckpointError, ConfigError, WorkdirError
from beyond_outliers.mesh import processes
from beyond_outliers.model import transformer
from beyond_outliers.model.forward import Forward
from beyond_outliers.train.program import Program
from beyond_outliers.train.step import TrainState
from beyond_outliers.types import Batch, Json, Params, PathLike

if TYPE_CHECKING:
  from beyond_outliers import data
  from beyond_outliers.checkpoint import Checkpoints

# Fields that may differ between two models that compute the same function, up to rounding.
MAY_DIFFER = ("init_std", "dtype", "attention", "unroll", "remat")


class Start(NamedTuple):
  """Where a run begins or continues."""

  state: TrainState
  position: Json | None  # in the data; None: the beginning
  seconds: float  # spent training so far
  record: Json | None = None  # what the checkpoint says about its run; see run_hooks._save
  parent: Json | None = None  # whose parameters the run begins with, if another run's


def start(
  program: Program,
  checkpoints: Checkpoints,
  batches: data.Batches,
  fingerprints: Json,
  say: Callable[[str], None],
  step: int | None = None,
) -> Start:
  """The start: the newest intact checkpoint, or else `warm_start`'s parameters, or new ones.

  fingerprints: of the data, to compare with those in the checkpoint. step: take this checkpoint and
    no other.
  Errors: CheckpointError; ConfigError for a `warm_start` that does not fit, and for checkpoints of
    another configuration or other data."""
  c = program.config
  restored = checkpoints.restore(program.state, step)
  if restored is not None:
    step, state, position, clock = restored
    record = checkpoints.run_of(step)
    if record is not None:
      _check_record(record, c, fingerprints, checkpoints.directory / str(step))
    say(f"resuming from step {step} of {c.steps}")
    return Start(state, position, clock["seconds"], record)
  state, parent = program.init(), None
  if c.warm_start:
    parent, params = warm_start_params(c, fingerprints["tokenizer"], program.mesh)
    say(f"parameters from step {parent['step']} of {c.warm_start}")
  else:
    params = transformer.without_dot_general_params(c.model, state.params)
  if jax.tree.structure(params) != jax.tree.structure(state.params):
    params = _with_scales(program, params, batches)
  if state.average is not None:
    state = state._replace(average=jax.tree.map(jnp.copy, params))
  return Start(state._replace(params=params), None, 0.0, parent=parent)


def check_same_run(old: config.Config, new: config.Config, path: PathLike) -> None:
  """Refuses to resume the run of configuration `old`, at `path`, under `new`, or to take its
  results for those of `new`, if that would be another model.

  Errors: ConfigError as in `config.check_resumable`, and for other micro-batches if the recipe's
  results depend on them."""
  sees_batches = quant.recipes.from_config(new.quant).sees_batches
  try:
    config.check_resumable(old, new)
    require(
      old.micro_batches == new.micro_batches or not sees_batches,
      "micro_batches",
      new.micro_batches,
      f"the workdir's run has {old.micro_batches}, on which its gradients depend, as they are "
      f"quantized ({quant.recipes.name_of(new.quant)}); leave it as it was, or give another "
      "--workdir",
    )
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from None


def _check_record(saved: Json, c: config.Config, fingerprints: Json, path: PathLike) -> None:
  """Refuses another run's checkpoint, by its own record: the workdir's config.json and
  manifest.json may be lost or another run's. Errors: ConfigError."""
  check_same_run(config.resolve(saved["config"]), c, path)
  for key, was in saved["data"].items():
    require(
      was == fingerprints[key],
      f"data: {key}",
      fingerprints[key],
      f"{path} was trained on {was}; restore those data, or start a new workdir",
    )


def check_parent(was: Json, now: Json, path: str) -> None:
  """Refuses to start a run again, which has no checkpoint yet, with other parameters than those
  that its manifest names. path: its `warm_start`. Errors: WorkdirError."""
  if was["parameters"] != now["parameters"]:
    first, second = (f"step {of['step']} of the run {of['run'][:12]}" for of in (was, now))
    raise WorkdirError(
      f"warm_start = {path!r}: the run began with {first} (manifest.json), but these are other "
      f"parameters, {second}; restore the former, or give another --workdir"
    )


def warm_start_params(
  c: config.Config, tokenizer: str, mesh: jax.sharding.Mesh
) -> tuple[Json, Params]:
  """(their description for a manifest, the parameters) of the newest intact checkpoint in
  `c.warm_start`, placed on the mesh.

  Learned scales are included if the other run followed the same recipe, otherwise dropped.
  tokenizer: fingerprint of this run's.
  Errors: ConfigError if there is no run or checkpoint, or if it has another model or another
    tokenizer, whose ids stand for other text."""
  from beyond_outliers.checkpoint import digests  # imports Orbax, which a dry run does not need

  try:
    source = runs.open(c.warm_start)
    processes.agree("warm_start", lambda: {"the run": source.identity})
    theirs = source.config
    _check_same_model(c.warm_start, theirs.model, c.model)
    was = source.trained_on["tokenizer"]
    if was != tokenizer:
      raise ConfigError(
        f"warm_start = {c.warm_start!r}: data.tokenizer is {theirs.data.tokenizer!r} ({was[:12]}) "
        f"in that run and {c.data.tokenizer!r} ({tokenizer[:12]}) in this one; use a run with the "
        "same tokenizer, or prepare this one's text with that run's"
      )
    step, found = source.restore(mesh)
    # Digests of what was read: the folder may hold another run by the time someone looks.
    contents = digests.examine({"params": found})
    if contents.not_finite:
      raise CheckpointError(f"the parameters of step {step} are not finite; use another run")
  except (CheckpointError, WorkdirError) as error:
    raise ConfigError(f"warm_start = {c.warm_start!r}: {error}") from None
  parent = {
    "workdir": source.name,
    "run": source.identity,
    "step": step,
    "parameters": digests.of_params_among(contents.digests),
  }
  alike = quant.recipes.from_config(theirs.quant) == quant.recipes.from_config(c.quant)
  return parent, found if alike else transformer.without_dot_general_params(c.model, found)


def _check_same_model(path: str, theirs: config.Model, ours: config.Model) -> None:
  for field in dataclasses.fields(config.Model):
    was, now = getattr(theirs, field.name), getattr(ours, field.name)
    if field.name not in MAY_DIFFER and was != now:
      raise ConfigError(
        f"warm_start = {path!r}: model.{field.name} is {was!r} in that run and {now!r} in this "
        "one; use a run of the same model"
      )


def _with_scales(program: Program, params: Params, batches: data.Batches) -> Params:
  """The parameters with learned scales, initialized on the first micro-batch.

  Training still uses that batch: the data are put back to their position."""
  c = program.config
  position = batches.state()
  first = jax.tree.map(lambda x: x[:: c.micro_batches], next(batches))
  batches.restore(position)
  begin_scales = jax.jit(
    make_begin_scales(program.forward),
    out_shardings=jax.tree.map(lambda x: x.sharding, program.state.params),
  )
  rows = c.batch_size // c.micro_batches
  return begin_scales(params, mesh_lib.put_batch(first, program.mesh, rows))


def make_begin_scales(forward: Forward) -> Callable[[Params, Batch], Params]:
  """begin_scales(params without learned scales, batch) -> params with them, initialized by a
  forward pass on the batch."""

  def begin_scales(params: Params, batch: Batch) -> Params:
    # Flax needs a key to make parameters; scales draw nothing from it.
    rngs = {"params": jax.random.key(0)}
    _, whole = forward(params, batch, mutable=["params"], rngs=rngs)
    return nn.unbox(whole["params"])

  return begin_scales
