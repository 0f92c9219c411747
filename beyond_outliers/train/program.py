"""Program of a run: shapes, shardings and jitted functions, built before any array exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beyond_outliers import config, hardware, optim, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.evaluate import steps
from beyond_outliers.mesh import jax_settings
from beyond_outliers.model import linears, transformer
from beyond_outliers.model.forward import Forward, make_forward
from beyond_outliers.train import step as step_lib
from beyond_outliers.train.step import TrainState
from beyond_outliers.types import Batch, Metrics, Params

# (state, parameters before the last step, their change, sample or None) -> metrics for the log.
Statistics = Callable[[TrainState, Params, Params, Batch | None], Metrics]


@dataclasses.dataclass(frozen=True)
class Program:
  """Shapes, shardings and functions of a run, without arrays."""

  config: config.Config
  mesh: jax.sharding.Mesh
  model: transformer.Transformer
  forward: Forward
  optimizer: optim.Optimizer
  state: TrainState  # ShapeDtypeStructs with shardings
  batch: dict[str, jax.ShapeDtypeStruct]
  eval_batch: dict[str, jax.ShapeDtypeStruct]
  train_step: Any  # jitted (state, batch) -> (state, metrics); donates the state
  eval_step: Any  # jitted (params, batch) -> (nll_BxL, document_BxL or 0), whole on every process
  statistics: Statistics

  def init(self) -> TrainState:
    """The state a run begins with, created in its shardings."""

    def make():
      params = transformer.init(self.model, self.config.seed)
      return step_lib.init_state(params, self.optimizer.tx, **_state_options(self.config))

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, self.state))()

  def compile_train_step(self) -> Any:
    """The train step, compiled for the shapes of this run. Call under `mesh.use`."""
    compiled = self.train_step.lower(self.state, self.batch).compile()
    hardware.return_freed_memory()
    return compiled

  def compile(self) -> tuple[Any, Any]:
    """(train step, evaluation step), compiled for the shapes of this run. Call under `mesh.use`."""
    eval_step = self.eval_step.lower(self.state.params, self.eval_batch).compile()
    return self.compile_train_step(), eval_step


def build_program(c: config.Config, devices: Sequence[jax.Device] | None = None) -> Program:
  """The program of a configuration. devices: all by default.

  Errors: ConfigError for what the mesh cannot split, for a recipe that does not fit the model, and
    for dtypes that JAX's present settings do not allow."""
  jax_settings.check_dtypes(c)
  mesh = mesh_lib.make_mesh(c.mesh, devices)
  recipe = quant.recipes.from_config(c.quant)
  _check_splits(c, mesh, recipe)
  model = transformer.Transformer(c.model, quant.dot_general_for(recipe, c.quant.backend))
  forward = make_forward(model, c.data.mask_documents)
  boxed = transformer.boxed_shapes(model)
  params, param_shardings = nn.unbox(boxed), mesh_lib.shardings(boxed, mesh)
  optimizer = optim.build(
    c.optimizer, params, c.steps, schedule=c.schedule, axes=transformer.axes(model), mesh=mesh
  )
  # Any: the TrainState below holds shardings in place of arrays.
  everywhere: Any = mesh_lib.replicated(mesh)
  state = jax.eval_shape(
    lambda p: step_lib.init_state(p, optimizer.tx, **_state_options(c)), params
  )
  shardings = TrainState(
    everywhere,
    param_shardings,
    optimizer.state_shardings(param_shardings),
    everywhere,
    everywhere,
    None if state.average is None else param_shardings,
    jax.tree.map(lambda _: everywhere, state.recent),
  )
  step = step_lib.make_train_step(
    step_lib.make_loss_fn(forward),
    optimizer.tx,
    optimizer.schedules,
    seed=c.seed,
    shardings=param_shardings,
    micro_batches=c.micro_batches,
    average_decay=c.average.decay,
    max_gradient_norm=c.max_gradient_norm,
    spike_sigmas=c.spikes.sigmas,
  )
  return Program(
    config=c,
    mesh=mesh,
    model=model,
    forward=forward,
    optimizer=optimizer,
    state=mesh_lib.placed(state, shardings),
    batch=_batch_shapes(c.batch_size, c.context, mesh),
    eval_batch=_batch_shapes(c.eval.batch_size, c.context, mesh),
    train_step=jax.jit(step, out_shardings=(shardings, None), donate_argnums=0),
    eval_step=jax.jit(steps.make_eval_step(forward), out_shardings=everywhere),
    statistics=_statistics(c, forward, recipe, optimizer),
  )


def _state_options(c: config.Config) -> Any:
  """Options of `init_state`: what a run's state holds besides parameters and optimizer state."""
  return {
    "averaged": c.average.decay > 0,
    "spike_window": c.spikes.window if c.spikes.sigmas else 0,
  }


def _check_splits(c: config.Config, mesh: jax.sharding.Mesh, recipe: quant.Recipe) -> None:
  """Refuses a mesh that does not divide a batch, the heads, or a quantization block.

  Errors: ConfigError."""
  mesh_lib.check_batch(mesh, "batch_size / micro_batches", c.batch_size // c.micro_batches)
  mesh_lib.check_batch(mesh, "eval.batch_size", c.eval.batch_size)
  if c.model.kv_heads % mesh.shape["model"]:
    raise config.ConfigError(
      f"mesh.model = {mesh.shape['model']}: must divide model.kv_heads ({c.model.kv_heads}), or "
      "every layer gathers its attention; use a smaller one, and a larger mesh.fsdp"
    )
  recipe.check(
    {
      path: quant.LinearShape(width, mesh.shape["model"] if split else 1)
      for path, (width, split) in linears.contractions(c.model).items()
    }
  )


def _batch_shapes(
  rows: int, context: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  sharding = mesh_lib.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(
      (rows, context), jnp.float32 if name == "weights" else jnp.int32, sharding=sharding
    )
    for name in ("tokens", "targets", "segment_ids", "positions", "weights")
  }


def _statistics(
  c: config.Config, forward: Forward, recipe: quant.Recipe, optimizer: optim.Optimizer
) -> Statistics:
  """Metrics that a row of the log holds in addition to the step's."""
  of_optimizer = optimizer.step_metrics if c.log.update_statistics else optimizer.state_metrics
  of_quant = make_quant_statistics(forward, c.model, recipe)

  def statistics(state: TrainState, before: Params, update: Params, sample: Batch | None):
    quantized = {} if sample is None else of_quant(state.params, before, sample)
    return {**of_optimizer(state.opt_state, update), **quantized}

  return statistics


def make_quant_statistics(
  forward: Forward, c: config.Model, recipe: quant.Recipe
) -> Callable[[Params, Params, Batch], Metrics]:
  """quant_statistics(params, params before the last step, batch) -> metrics of quant/metrics.py."""

  def quant_statistics(params: Params, before: Params, batch: Batch):
    _, sown = forward(params, batch, mutable=["statistics"])
    return {
      **quant.metrics.of_weights(recipe, linears.linears(c, params), linears.linears(c, before)),
      **quant.metrics.of_activations(linears.of_dot_generals(c, sown.get("statistics", {}))),
    }

  return quant_statistics
