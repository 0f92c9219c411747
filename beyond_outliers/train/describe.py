"""Description of a run before it trains: configuration, parameters, and the cost of a step."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from beyond_outliers import cli, config, quant
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.model import linears, transformer
from beyond_outliers.params import path_of
from beyond_outliers.train.program import Program


def describe(program: Program) -> str:
  """The resolved configuration, a table of parameters, and how many layers follow each recipe."""
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
      (path_of(path), "×".join(map(str, leaf.shape)), f"{leaf.size:,}", label, f"({split})")
    )
  lines += ["  " + line for line in cli.aligned(rows)]
  lines.append(_describe_recipe(c))
  counts, tokens = transformer.count(program.state.params), c.steps * c.batch_size * c.context
  lines.append(
    f"{counts['total']:,} parameters, {counts['embedding']:,} of them the embedding · "
    f"{tokens:,} tokens in {c.steps:,} steps ({tokens / counts['total']:.1f} per parameter) · "
    f"mesh {dict(program.mesh.shape)}"
  )
  return "\n".join(lines)


def _describe_recipe(c: config.Config) -> str:
  recipe = quant.recipes.from_config(c.quant)
  names = [*(rule.recipe for rule in c.quant.rules.values()), c.quant.recipe]
  layers = collections.Counter(map(recipe.rule, linears.contractions(c.model)))
  rules = (
    f"{layers[i]} as {paths!r}: {name}"
    for i, ((paths, _), name) in enumerate(zip(recipe.rules, names, strict=True))
  )
  return "linear layers: " + ", ".join(rules)


def describe_compiled(program: Program) -> str:
  """FLOPs of a train step, and its memory on each device by class of buffer, as compiled; and the
  evaluation step's memory."""
  c = program.config
  with mesh_lib.use(program.mesh):
    compiled, compiled_evaluation = program.compile()
  classes = memory_classes(program, compiled)
  evaluation_memory = compiled_evaluation.memory_analysis()
  model_flops = c.batch_size * c.context * transformer.flops_per_token(c.model, c.context)
  lines = [
    f"FLOPs per step: {model_flops:.4g} by the model's formula, all devices together; "
    f"{compiled.cost_analysis().get('flops', math.nan):.4g} on each device by XLA "
    "(loops counted once)",
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


def memory_classes(program: Program, compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes on each device, by class of buffer, while the compiled train step runs."""
  average, memory = program.state.average, compiled.memory_analysis()
  assert memory is not None
  return {
    "parameters": shard_bytes(program.state.params),
    "optimizer state": shard_bytes(program.state.opt_state),
    **({} if average is None else {"moving average": shard_bytes(average)}),
    "batch": shard_bytes(program.batch),
    "activations, gradients, temporaries": memory.temp_size_in_bytes,
    "outputs that reuse no input": memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }


def shard_bytes(tree: Any) -> int:
  """Bytes that each device holds of a tree of sharded shapes; all shards are equal."""

  def size(x):
    assert isinstance(x.sharding, NamedSharding)
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(size(x) for x in jax.tree.leaves(tree))
