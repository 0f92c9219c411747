"""Wires one run: config in, a workdir out."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from beyond_outliers import checkpoint, config, data, evaluation, hardware, loop, optim, quant, text_table, warm_start, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import step as step_lib
from beyond_outliers.model import transformer


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run computes, before any of it is computed: shapes, shardings and functions, but no arrays."""
  config: config.Config
  mesh: jax.sharding.Mesh
  model: transformer.Transformer
  optimizer: optim.Optimizer
  state: step_lib.TrainState                # ShapeDtypeStructs with shardings
  batch: dict[str, jax.ShapeDtypeStruct]
  eval_batch: dict[str, jax.ShapeDtypeStruct]
  train_step: Any                           # jitted (state, batch) -> (state, metrics); donates the state
  eval_step: Any                            # jitted (params, batch) -> (nll_BxL, document_BxL or 0), whole on every process
  statistics: Any                           # (state, params before, their change, batch) -> metrics, for loop.Log

  def init(self) -> step_lib.TrainState:
    """The state a run begins with, created where it lives."""
    make = lambda: step_lib.init_state(transformer.init(self.model, self.config.seed), self.optimizer.tx)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, self.state))()

  def compile(self) -> tuple[Any, Any]:
    """(train step, evaluation step), compiled for the shapes of this run. Call under `mesh.use`."""
    return (self.train_step.lower(self.state, self.batch).compile(),
            self.eval_step.lower(self.state.params, self.eval_batch).compile())


def build(c: config.Config, devices: Sequence[jax.Device] | None = None) -> Program:
  """devices: all by default. Errors: ConfigError for what the mesh cannot split or the recipe not fit."""
  mesh = mesh_lib.make_mesh(c.mesh, devices)
  mesh_lib.check_batch(mesh, "batch_size / micro_batches", c.batch_size // c.micro_batches)
  mesh_lib.check_batch(mesh, "eval.batch_size", c.eval.batch_size)
  if c.model.kv_heads % mesh.shape["model"]:
    raise config.ConfigError(f"mesh.model = {mesh.shape['model']}: must divide model.kv_heads ({c.model.kv_heads}), or every "
                             "layer gathers its attention; take a smaller one, and a larger mesh.fsdp")
  recipe = quant.recipes.from_config(c.quant)
  recipe.check({path: quant.Contraction(width, mesh.shape["model"] if split else 1)
                for path, (width, split) in transformer.contractions(c.model).items()})
  model = transformer.Transformer(c.model, quant.dot_general_for(recipe, c.quant.backend))
  boxed = transformer.boxed_shapes(model)
  params, param_shardings = nn.unbox(boxed), mesh_lib.shardings(boxed, mesh)
  optimizer = optim.build(c.optimizer, params, c.steps, schedule=c.schedule, axes=transformer.axes(model), mesh=mesh)

  everywhere: Any = mesh_lib.replicated(mesh)          # Any: below, a TrainState holds shardings in the places of arrays
  state = jax.eval_shape(lambda p: step_lib.init_state(p, optimizer.tx), params)
  shardings = step_lib.TrainState(everywhere, param_shardings, optimizer.state_shardings(param_shardings), everywhere, everywhere)
  state = mesh_lib.placed(state, shardings)
  rows = mesh_lib.batch_sharding(mesh)
  types = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
  batch, eval_batch = ({name: jax.ShapeDtypeStruct((size, c.context), dtype, sharding=rows) for name, dtype in types.items()}
                       for size in (c.batch_size, c.eval.batch_size))

  step = step_lib.make_train_step(step_lib.make_loss_fn(model, c.data.mask_documents), optimizer.tx, optimizer.schedules,
                                  seed=c.seed, micro_batches=c.micro_batches)
  return Program(
    c, mesh, model, optimizer, state, batch, eval_batch,
    jax.jit(step, out_shardings=(shardings, None), donate_argnums=0),
    jax.jit(step_lib.make_eval_step(model, c.data.mask_documents), out_shardings=everywhere),
    _statistics(c, model, recipe, optimizer))


def _statistics(c: config.Config, model: transformer.Transformer, recipe: quant.Recipe, optimizer: optim.Optimizer):
  """What a row of the log tells beside the metrics of the step."""
  of_optimizer = optimizer.statistics if c.log.update_statistics else optimizer.state_statistics
  of_quant = step_lib.make_quant_statistics(model, recipe, c.data.mask_documents)

  def statistics(state, before, update, sample):
    quantized = {} if sample is None else of_quant(state.params, before, sample)
    return {**of_optimizer(state.opt_state, update), **quantized}
  return statistics


def _sample(program: Program, validation: data.ValidationBatches) -> dict[str, jax.Array] | None:
  """What the statistics of quantization are of: the first validation windows, one on each device that splits a batch."""
  c, mesh = program.config, program.mesh
  if not c.log.quant_statistics or not quant.recipes.from_config(c.quant).quantizes:
    return None
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  first = {name: x[:len(x) * rows // c.eval.batch_size] for name, x in next(iter(validation)).items()}
  return mesh_lib.put_batch(first, mesh, rows)


def run(c: config.Config, workdir_path: Any, *, dry_run: bool = False, say: Callable[[str], None] | None = None,
        devices: Sequence[jax.Device] | None = None) -> str:
  """Trains, or resumes, the run of a workdir; returns its status: done, preempted or diverged.

  Errors: ConfigError, WorkdirError, CheckpointError, or what the data refuse, before any training."""
  say = say or (lambda text: print(text, file=sys.stderr, flush=True) if jax.process_index() == 0 else None)
  program = build(c, devices)
  say(describe(program))
  if dry_run:
    say(describe_compiled(program))
    return "done"

  workdir = writers.Workdir(workdir_path)
  before = workdir.read("config.json")
  if before is not None:
    config.check_resumable(config.resolve(before), c)
  with workdir.lock():
    return _train(program, workdir, say)


def _train(program: Program, workdir: writers.Workdir, say: Callable[[str], None]) -> str:
  c, mesh = program.config, program.mesh
  dataset = data.prepare(c.data, log=say)                  # several processes: one does the work, the others wait for its lock
  index, count = mesh_lib.share_of_rows(mesh, c.batch_size)
  mine = dict(process_index=index, process_count=count)
  batches = data.train_batches(dataset, c.data, context=c.context, batch_size=c.batch_size, seed=c.seed, **mine)
  validation = data.validation_batches(dataset, c.data, context=c.context, batch_size=c.eval.batch_size,
                                       documents=c.eval.documents, **mine)
  checkpoints = checkpoint.Checkpoints(workdir.checkpoints, c.checkpoint)
  with contextlib.ExitStack() as stack:
    stack.callback(batches.close)
    stack.enter_context(mesh_lib.use(mesh))
    state, position, clock_start = _begin(program, checkpoints, batches, say)
    first = int(state.step)
    if first >= c.steps:
      say(f"nothing left to do: {workdir.path} is at step {first} of {c.steps}")
      checkpoints.close()
      workdir.set_status("done", first)
      return "done"
    if position is not None:
      batches.restore(position)
    manifest = _manifest(program, dataset, workdir)
    started = time.perf_counter()
    train_step, eval_step = program.compile()
    say(f"compiled the steps in {time.perf_counter() - started:.1f} s")
    peak, peak_source = hardware.peak_flops(c.model.dtype)
    say(f"peak: {peak / 1e9:,.0f} GFLOP/s a device in {c.model.dtype} ({peak_source}) · unigram entropy of the validation text: "
        f"{dataset.unigram_entropy('validation'):.4f} nats · workdir: {workdir.path}")
    sinks = _sinks(c, workdir, first)
    for sink in sinks:
      stack.callback(sink.close)

    # From here on there is a run: what could be refused has been.
    workdir.write("config.json", config.to_dict(c))
    workdir.write("manifest.json", manifest)
    workdir.set_status("running", first)
    tokens_per_step = c.batch_size * c.context
    clock = loop.Clock(clock_start["seconds"] if clock_start else 0.0)
    log = loop.Log(c.log.every, sinks, clock, state, tokens_per_step=tokens_per_step,
                   flops_per_step=tokens_per_step * transformer.flops_per_token(c.model, c.context),
                   peak_flops=peak * mesh.size, num_steps=c.steps, max_skipped=c.max_skipped_updates,
                   statistics=program.statistics, sample=_sample(program, validation))
    evaluate = _evaluation(eval_step, validation, mesh, dataset.bytes("validation", c.eval.documents))
    save = loop.Save(c.checkpoint, checkpoints, batches.state, clock, tokens_per_step=tokens_per_step, num_steps=c.steps,
                     before=log.flush)
    stack.callback(save.close)
    periodic = dict(num_steps=c.steps, before=log.flush)
    hooks: list[loop.Hook] = [log, loop.Evaluate(c.eval.every, evaluate, sinks, clock, **periodic)]
    if c.log.outliers_every:
      measure = _outliers(program.model, validation, mesh, c.data.mask_documents)
      hooks.append(loop.Evaluate(c.log.outliers_every, measure, sinks, clock, **periodic, name="outliers"))
    hooks.append(save)
    if c.log.profile_step:
      profile = loop.Profile(workdir.path / "profile", c.log.profile_step, c.log.profile_steps)
      stack.callback(profile.close)
      hooks.append(profile)

    status, step, reason = "done", c.steps, ""
    try:
      try:
        loop.fit(train_step, state, (mesh_lib.put_batch(batch, mesh, c.batch_size) for batch in batches), hooks, c.steps)
      except loop.Stop as stop:
        status, step, reason = stop.status, stop.step, stop.reason
      checkpoints.close()                                  # waits; a write that failed in the background raises here
    except BaseException as error:
      workdir.set_status("failed", max([first, *checkpoints.steps()]), f"{type(error).__name__}: {error}")
      raise
    workdir.set_status(status, step, reason)
    say(f"{status}{': ' + reason if reason else ''} · {workdir.path}")
  return status


def _begin(program: Program, checkpoints: checkpoint.Checkpoints, batches: data.Batches, say: Callable[[str], None]):
  """(state, position of the data or None, clock or None): from the newest intact checkpoint, another run, or scratch."""
  c = program.config
  restored = checkpoints.restore(program.state)
  if restored is not None:
    step, state, position, clock = restored
    say(f"resuming from step {step} of {c.steps}")
    return state, position, clock
  state = program.init()
  if c.warm_start:
    step, params = warm_start.params(c, program.mesh)
    say(f"parameters from step {step} of {c.warm_start}")
  else:
    params = transformer.without_own(c.model, state.params)
  if jax.tree.structure(params) != jax.tree.structure(state.params):
    params = _with_scales(program, params, batches)
  return state._replace(params=params), None, None


def _with_scales(program: Program, params: Any, batches: data.Batches) -> Any:
  """The parameters with learned scales, which begin as the first micro-batch says. It is trained on, too."""
  c = program.config
  position = batches.state()
  first = {name: x[::c.micro_batches] for name, x in next(batches).items()}
  batches.restore(position)
  begin = jax.jit(step_lib.make_begin_scales(program.model, c.data.mask_documents),
                  out_shardings=jax.tree.map(lambda x: x.sharding, program.state.params))
  return begin(params, mesh_lib.put_batch(first, program.mesh, c.batch_size // c.micro_batches))


def _evaluation(eval_step: Any, batches: data.ValidationBatches, mesh: jax.sharding.Mesh,
                num_bytes: int | None) -> Callable[[Any], dict[str, Any]]:
  """params -> metrics on the fixed set of validation documents."""
  def evaluate(params):
    def token_losses(batch):
      return jax.device_get(eval_step(params, mesh_lib.put_batch(batch, mesh, batches.batch_size)))
    return evaluation.evaluate(token_losses, batches, num_bytes)
  return evaluate


def _outliers(model: transformer.Transformer, batches: data.ValidationBatches, mesh: jax.sharding.Mesh,
              mask_documents: bool) -> Callable[[Any], dict[str, float]]:
  """params -> metrics of activations, on the fixed set of validation documents, and of weights."""
  from beyond_outliers.analysis import outliers  # brings pandas, which a run without this hook can spare
  measure = outliers.on_documents(model, batches, mesh, mask_documents)
  return lambda params: measure(params, params)


def _sinks(c: config.Config, workdir: writers.Workdir, first: int) -> list[writers.Writer]:
  if jax.process_index() != 0:
    return []
  sinks: list[writers.Writer] = [writers.JsonLines(workdir.path / "metrics.jsonl", first), writers.Console(c.steps)]
  if c.log.tensorboard:
    sinks.append(writers.TensorBoard(workdir.path / "tensorboard", first))
  if c.log.wandb:
    sinks.append(writers.Wandb(workdir, c.log.wandb, config.to_dict(c)))
  return sinks


def _manifest(program: Program, dataset: data.Dataset, workdir: writers.Workdir) -> dict[str, Any]:
  """The first start's manifest, with every later start of the same workdir listed under `resumed`."""
  now = writers.manifest({
    "parameters": transformer.count(program.state.params),
    "data": {"directory": dataset.directory, "fingerprint": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint},
  })
  before = workdir.read("manifest.json")
  if before is None:
    return {"id": secrets.token_hex(8), **now, "resumed": []}       # two may begin in the same second
  if before["data"]["fingerprint"] != now["data"]["fingerprint"]:
    raise writers.WorkdirError(f"{workdir.path}: the run was trained on data {before['data']['fingerprint']}, and these are "
                               f"{now['data']['fingerprint']} ({dataset.directory}); restore the former, or start a new workdir")
  return {**before, "resumed": [*before["resumed"], now]}


def describe(program: Program) -> str:
  """The resolved config and the parameter table."""
  c, lines = program.config, ["config"]
  lines += [f"  {key} = {value!r}" for key, value in config.flatten(config.to_dict(c)).items()]
  lines.append("parameters")
  labels = jax.tree.leaves(program.optimizer.labels)
  rows = [("path", "shape", "count", "group", "split")]
  for (path, leaf), label in zip(jax.tree_util.tree_leaves_with_path(program.state.params), labels, strict=True):
    split = ", ".join("·".join(axes) if isinstance(axes, tuple) else str(axes or "—") for axes in leaf.sharding.spec)
    rows.append((optim.path_of(path), "×".join(map(str, leaf.shape)), f"{leaf.size:,}", label, f"({split})"))
  lines += ["  " + line for line in text_table.aligned(rows)]
  counts, tokens = transformer.count(program.state.params), c.steps * c.batch_size * c.context
  lines.append(f"{counts['total']:,} parameters, {counts['embedding']:,} of them the embedding · {tokens:,} tokens in "
               f"{c.steps:,} steps ({tokens / counts['total']:.1f} a parameter) · mesh {dict(program.mesh.shape)}")
  return "\n".join(lines)


def describe_compiled(program: Program) -> str:
  """Compiles both steps and says what it takes: FLOPs, and memory by class of buffer on each device."""
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
  lines = [f"FLOPs a step: {model_flops:.4g} by the model's formula, all devices together; "
           f"{compiled.cost_analysis().get('flops', math.nan):.4g} on each device by XLA (loops counted once)",
           f"memory on each of {program.mesh.size} devices"]
  lines += [f"  {name:<36}{size / 2**20:>12,.1f} MiB" for name, size in {**classes, "total": sum(classes.values())}.items()]
  lines.append(f"  evaluation, beside parameters and optimizer state: {evaluation_memory.temp_size_in_bytes / 2**20:,.1f} MiB")
  return "\n".join(lines)


def shard_bytes(tree: Any) -> int:
  """Bytes of a tree of sharded shapes on the device that holds the most, which is any: shards are equal."""
  def size(x):
    assert isinstance(x.sharding, NamedSharding)
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(size(x) for x in jax.tree.leaves(tree))
