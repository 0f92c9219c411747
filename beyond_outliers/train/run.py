"""Wires one run: config in, a workdir out."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from beyond_outliers import checkpoint, config, data, hardware, quant, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.evaluate import metrics
from beyond_outliers.model import transformer
from beyond_outliers.train import initialize, loop
from beyond_outliers.train import program as program_lib
from beyond_outliers.train import step as step_lib
from beyond_outliers.train.program import Program


def run(
  c: config.Config,
  workdir_path: Any,
  *,
  dry_run: bool = False,
  say: Callable[[str], None] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> str:
  """Trains, or resumes, the run of a workdir; returns its status: done, preempted or diverged.

  Errors: ConfigError, WorkdirError, CheckpointError, or what the data refuse, before any
    training."""
  say = say or (
    lambda text: print(text, file=sys.stderr, flush=True) if jax.process_index() == 0 else None
  )
  program = program_lib.build(c, devices)
  say(program_lib.describe(program))
  if dry_run:
    say(program_lib.describe_compiled(program))
    return "done"

  workdir = workdir_lib.Workdir(workdir_path)
  before = workdir.read("config.json")
  if before is not None:
    config.check_resumable(config.resolve(before), c)
  with workdir.lock():
    return _train(program, workdir, say)


def _train(program: Program, workdir: workdir_lib.Workdir, say: Callable[[str], None]) -> str:
  c, mesh = program.config, program.mesh
  dataset = data.prepare(
    c.data, log=say
  )  # several processes: one does the work, the others wait for its lock
  index, count = mesh_lib.share_of_rows(mesh, c.batch_size)
  mine = dict(process_index=index, process_count=count)
  batches = data.train_batches(
    dataset, c.data, context=c.context, batch_size=c.batch_size, seed=c.seed, **mine
  )
  validation = data.validation_batches(
    dataset,
    c.data,
    context=c.context,
    batch_size=c.eval.batch_size,
    documents=c.eval.documents,
    **mine,
  )
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
    say(
      f"peak: {peak / 1e9:,.0f} GFLOP/s a device in {c.model.dtype} ({peak_source}) · unigram "
      "entropy of the validation text: "
      f"{dataset.unigram_entropy('validation'):.4f} nats · workdir: {workdir.path}"
    )
    sinks = _sinks(c, workdir, first)
    for sink in sinks:
      stack.callback(sink.close)

    # From here on there is a run: what could be refused has been.
    workdir.write("config.json", config.to_dict(c))
    workdir.write("manifest.json", manifest)
    workdir.set_status("running", first)
    tokens_per_step = c.batch_size * c.context
    clock = loop.Clock(clock_start["seconds"] if clock_start else 0.0)
    log = loop.Log(
      c.log.every,
      sinks,
      clock,
      state,
      tokens_per_step=tokens_per_step,
      flops_per_step=tokens_per_step * transformer.flops_per_token(c.model, c.context),
      peak_flops=peak * mesh.size,
      num_steps=c.steps,
      max_skipped=c.max_skipped_updates,
      statistics=program.statistics,
      sample=_sample(program, validation),
    )
    evaluate = _evaluation(
      eval_step, validation, mesh, dataset.bytes("validation", c.eval.documents)
    )
    save = loop.Save(
      c.checkpoint,
      checkpoints,
      batches.state,
      clock,
      tokens_per_step=tokens_per_step,
      num_steps=c.steps,
      before=log.flush,
    )
    stack.callback(save.close)
    periodic = dict(num_steps=c.steps, before=log.flush)
    hooks: list[loop.Hook] = [log, loop.Evaluate(c.eval.every, evaluate, sinks, clock, **periodic)]
    if c.log.outliers_every:
      measure = _outliers(program.model, validation, mesh, c.data.mask_documents)
      hooks.append(
        loop.Evaluate(c.log.outliers_every, measure, sinks, clock, **periodic, name="outliers")
      )
    hooks.append(save)
    if c.log.profile_step:
      profile = loop.Profile(workdir.path / "profile", c.log.profile_step, c.log.profile_steps)
      stack.callback(profile.close)
      hooks.append(profile)

    status, step, reason = "done", c.steps, ""
    try:
      try:
        loop.fit(
          train_step,
          state,
          (mesh_lib.put_batch(batch, mesh, c.batch_size) for batch in batches),
          hooks,
          c.steps,
        )
      except loop.Stop as stop:
        status, step, reason = stop.status, stop.step, stop.reason
      checkpoints.close()  # waits; a write that failed in the background raises here
    except BaseException as error:
      workdir.set_status(
        "failed", max([first, *checkpoints.steps()]), f"{type(error).__name__}: {error}"
      )
      raise
    workdir.set_status(status, step, reason)
    say(f"{status}{': ' + reason if reason else ''} · {workdir.path}")
  return status


def _begin(
  program: Program,
  checkpoints: checkpoint.Checkpoints,
  batches: data.Batches,
  say: Callable[[str], None],
):
  """(state, position of the data or None, clock or None): from the newest intact checkpoint,
  another run, or scratch."""
  c = program.config
  restored = checkpoints.restore(program.state)
  if restored is not None:
    step, state, position, clock = restored
    say(f"resuming from step {step} of {c.steps}")
    return state, position, clock
  state = program.init()
  if c.warm_start:
    step, params = initialize.params(c, program.mesh)
    say(f"parameters from step {step} of {c.warm_start}")
  else:
    params = transformer.without_dot_general_params(c.model, state.params)
  if jax.tree.structure(params) != jax.tree.structure(state.params):
    params = _with_scales(program, params, batches)
  return state._replace(params=params), None, None


def _with_scales(program: Program, params: Any, batches: data.Batches) -> Any:
  """The parameters with learned scales, which begin as the first micro-batch says. It is trained
  on, too."""
  c = program.config
  position = batches.state()
  first = {name: x[:: c.micro_batches] for name, x in next(batches).items()}
  batches.restore(position)
  begin = jax.jit(
    step_lib.make_begin_scales(program.model, c.data.mask_documents),
    out_shardings=jax.tree.map(lambda x: x.sharding, program.state.params),
  )
  return begin(params, mesh_lib.put_batch(first, program.mesh, c.batch_size // c.micro_batches))


def _evaluation(
  eval_step: Any, batches: data.ValidationBatches, mesh: jax.sharding.Mesh, num_bytes: int | None
) -> Callable[[Any], dict[str, Any]]:
  """params -> metrics on the fixed set of validation documents."""

  def evaluate(params):
    def token_losses(batch):
      return jax.device_get(eval_step(params, mesh_lib.put_batch(batch, mesh, batches.batch_size)))

    return metrics.evaluate(token_losses, batches, num_bytes)

  return evaluate


def _outliers(
  model: transformer.Transformer,
  batches: data.ValidationBatches,
  mesh: jax.sharding.Mesh,
  mask_documents: bool,
) -> Callable[[Any], dict[str, float]]:
  """params -> metrics of activations, on the fixed set of validation documents, and of weights."""
  from beyond_outliers.evaluate import activations

  measure = activations.on_documents(model, batches, mesh, mask_documents)
  return lambda params: measure(params, params)


def _sinks(c: config.Config, workdir: workdir_lib.Workdir, first: int) -> list[writers.Writer]:
  if jax.process_index() != 0:
    return []
  sinks: list[writers.Writer] = [
    writers.JsonLines(workdir.path / "metrics.jsonl", first),
    writers.Console(c.steps),
  ]
  if c.log.tensorboard:
    sinks.append(writers.TensorBoard(workdir.path / "tensorboard", first))
  if c.log.wandb:
    sinks.append(writers.Wandb(workdir, c.log.wandb, config.to_dict(c)))
  return sinks


def _manifest(
  program: Program, dataset: data.Dataset, workdir: workdir_lib.Workdir
) -> dict[str, Any]:
  """The first start's manifest, with every later start of the same workdir listed under
  `resumed`."""
  now = workdir_lib.manifest(
    {
      "parameters": transformer.count(program.state.params),
      "data": {
        "directory": dataset.directory,
        "fingerprint": dataset.fingerprint,
        "tokenizer": dataset.tokenizer.fingerprint,
      },
    }
  )
  before = workdir.read("manifest.json")
  if before is None:
    return {"id": secrets.token_hex(8), **now, "resumed": []}  # two may begin in the same second
  if before["data"]["fingerprint"] != now["data"]["fingerprint"]:
    raise workdir_lib.WorkdirError(
      f"{workdir.path}: the run was trained on data {before['data']['fingerprint']}, and these are "
      f"{now['data']['fingerprint']} ({dataset.directory}); restore the former, or start a new "
      "workdir"
    )
  return {**before, "resumed": [*before["resumed"], now]}


def _sample(program: Program, validation: data.ValidationBatches) -> dict[str, jax.Array] | None:
  """What the statistics of quantization are of: the first validation windows, one on each device
  that splits a batch."""
  c, mesh = program.config, program.mesh
  if not c.log.quant_statistics or not quant.recipes.from_config(c.quant).quantizes:
    return None
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  first = {
    name: x[: len(x) * rows // c.eval.batch_size] for name, x in next(iter(validation)).items()
  }
  return mesh_lib.put_batch(first, mesh, rows)
