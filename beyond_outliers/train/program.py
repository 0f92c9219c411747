"""What a run computes, put together and described before any of it is computed."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from beyond_outliers import cli, config, optim, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.evaluate import steps
from beyond_outliers.model import linears, transformer
from beyond_outliers.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Program:
  """Shapes, shardings and functions, but no arrays."""

  config: config.Config
  mesh: jax.sharding.Mesh
  model: transformer.Transformer
  optimizer: optim.Optimizer
  state: step_lib.TrainState  # ShapeDtypeStructs with shardings
  batch: dict[str, jax.ShapeDtypeStruct]
  eval_batch: dict[str, jax.ShapeDtypeStruct]
  train_step: Any  # jitted (state, batch) -> (state, metrics); donates the state
  eval_step: Any  # jitted (params, batch) -> (nll_BxL, document_BxL or 0), whole on every process
  statistics: Any  # (state, params before, their change, batch) -> metrics, for loop.Log

  def init(self) -> step_lib.TrainState:
    """The state a run begins with, created where it lives."""
    make = lambda: step_lib.init_state(
      transformer.init(self.model, self.config.seed), self.optimizer.tx
    )
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, self.state))()

  def compile(self) -> tuple[Any, Any]:
    """(train step, evaluation step), compiled for the shapes of this run. Call under `mesh.use`."""
    return (
      self.train_step.lower(self.state, self.batch).compile(),
      self.eval_step.lower(self.state.params, self.eval_batch).compile(),
    )


def build(c: config.Config, devices: Sequence[jax.Device] | None = None) -> Program:
  """devices: all by default. Errors: ConfigError for what the mesh cannot split or the recipe not
  fit."""
  mesh = mesh_lib.make_mesh(c.mesh, devices)
  mesh_lib.check_batch(mesh, "batch_size / micro_batches", c.batch_size // c.micro_batches)
  mesh_lib.check_batch(mesh, "eval.batch_size", c.eval.batch_size)
  if c.model.kv_heads % mesh.shape["model"]:
    raise config.ConfigError(
      f"mesh.model = {mesh.shape['model']}: must divide model.kv_heads ({c.model.kv_heads}), or "
      "every "
      "layer gathers its attention; take a smaller one, and a larger mesh.fsdp"
    )
  recipe = quant.recipes.from_config(c.quant)
  recipe.check(
    {
      path: quant.LinearShape(
        width, *((mesh.shape["model"], 1) if split else (1, mesh.shape["fsdp"]))
      )
      for path, (width, split) in linears.contractions(c.model).items()
    }
  )
  model = transformer.Transformer(c.model, quant.dot_general_for(recipe, c.quant.backend))
  boxed = transformer.boxed_shapes(model)
  params, param_shardings = nn.unbox(boxed), mesh_lib.shardings(boxed, mesh)
  optimizer = optim.build(
    c.optimizer, params, c.steps, schedule=c.schedule, axes=transformer.axes(model), mesh=mesh
  )

  everywhere: Any = mesh_lib.replicated(
    mesh
  )  # Any: below, a TrainState holds shardings in the places of arrays
  state = jax.eval_shape(lambda p: step_lib.init_state(p, optimizer.tx), params)
  shardings = step_lib.TrainState(
    everywhere, param_shardings, optimizer.state_shardings(param_shardings), everywhere, everywhere
  )
  state = mesh_lib.placed(state, shardings)
  rows = mesh_lib.batch_sharding(mesh)
  types = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {
    "weights": jnp.float32
  }
  batch, eval_batch = (
    {
      name: jax.ShapeDtypeStruct((size, c.context), dtype, sharding=rows)
      for name, dtype in types.items()
    }
    for size in (c.batch_size, c.eval.batch_size)
  )

  step = step_lib.make_train_step(
    step_lib.make_loss_fn(model, c.data.mask_documents),
    optimizer.tx,
    optimizer.schedules,
    seed=c.seed,
    micro_batches=c.micro_batches,
  )
  return Program(
    c,
    mesh,
    model,
    optimizer,
    state,
    batch,
    eval_batch,
    jax.jit(step, out_shardings=(shardings, None), donate_argnums=0),
    jax.jit(steps.make_eval_step(model, c.data.mask_documents), out_shardings=everywhere),
    _statistics(c, model, recipe, optimizer),
  )


def _statistics(
  c: config.Config, model: transformer.Transformer, recipe: quant.Recipe, optimizer: optim.Optimizer
):
  """What a row of the log tells beside the metrics of the step."""
  of_optimizer = optimizer.step_metrics if c.log.update_statistics else optimizer.state_metrics
  of_quant = step_lib.make_quant_statistics(model, recipe, c.data.mask_documents)

  def statistics(state, before, update, sample):
    quantized = {} if sample is None else of_quant(state.params, before, sample)
    return {**of_optimizer(state.opt_state, update), **quantized}

  return statistics


def describe(program: Program) -> str:
  """The resolved config and the parameter table."""
  c, lines = program.config, ["config"]
  lines += [f"  {key} = {value!r}" for key, value in config.flatten(config.to_dict(c)).items()]
  lines.append("parameters")
  labels = jax.tree.leaves(program.optimizer.labels)
  rows = [("path", "shape", "count", "group", "split")]
  for (path, leaf), label in zip(
    jax.tree_util.tree_leaves_with_path(program.state.params), labels, strict=True
  ):
    split = ", ".join(
      "·".join(axes) if isinstance(axes, tuple) else str(axes or "—") for axes in leaf.sharding.spec
    )
    rows.append(
      (optim.path_of(path), "×".join(map(str, leaf.shape)), f"{leaf.size:,}", label, f"({split})")
    )
  lines += ["  " + line for line in cli.aligned(rows)]
  lines.append(_describe_recipe(c))
  counts, tokens = transformer.count(program.state.params), c.steps * c.batch_size * c.context
  lines.append(
    f"{counts['total']:,} parameters, {counts['embedding']:,} of them the embedding · {tokens:,} "
    "tokens in "
    f"{c.steps:,} steps ({tokens / counts['total']:.1f} a parameter) · mesh "
    f"{dict(program.mesh.shape)}"
  )
  return "\n".join(lines)


def _describe_recipe(c: config.Config) -> str:
  recipe, names = (
    quant.recipes.from_config(c.quant),
    [*(rule.recipe for rule in c.quant.rules.values()), c.quant.recipe],
  )
  layers = collections.Counter(map(recipe.rule, linears.contractions(c.model)))
  rules = (
    f"{layers[i]} as {paths!r}: {name}"
    for i, ((paths, _), name) in enumerate(zip(recipe.rules, names, strict=True))
  )
  return "linear layers: " + ", ".join(rules)


def describe_compiled(program: Program) -> str:
  """Compiles both steps and says what it takes: FLOPs, and memory by class of buffer on each
  device."""
  c = program.config
  with mesh_lib.use(program.mesh):
    compiled, compiled_evaluation = program.compile()
  memory, evaluation_memory = compiled.memory_analysis(), compiled_evaluation.memory_analysis()
  classes = {
    "parameters": shard_bytes(program.state.params),
    "optimizer state": shard_bytes(program.state.opt_state),
    "batch": shard_bytes(program.batch),
    "activations, gradients, temporaries": memory.temp_size_in_bytes,
    "outputs that reuse no input": memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }
  model_flops = c.batch_size * c.context * transformer.flops_per_token(c.model, c.context)
  lines = [
    f"FLOPs a step: {model_flops:.4g} by the model's formula, all devices together; "
    f"{compiled.cost_analysis().get('flops', math.nan):.4g} on each device by XLA (loops counted "
    "once)",
    f"memory on each of {program.mesh.size} devices",
  ]
  lines += [
    f"  {name:<36}{size / 2**20:>12,.1f} MiB"
    for name, size in {**classes, "total": sum(classes.values())}.items()
  ]
  lines.append(
    "  evaluation, beside parameters and optimizer state: "
    f"{evaluation_memory.temp_size_in_bytes / 2**20:,.1f} MiB"
  )
  return "\n".join(lines)


def shard_bytes(tree: Any) -> int:
  """Bytes of a tree of sharded shapes on the device that holds the most, which is any: shards are
  equal."""

  def size(x):
    assert isinstance(x.sharding, NamedSharding)
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(size(x) for x in jax.tree.leaves(tree))
