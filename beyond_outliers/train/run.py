"""Wiring of one run: configuration in, workdir out."""

from __future__ import annotations

import contextlib
import operator
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from beyond_outliers import config, data, hardware, quant, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.evaluate import metrics
from beyond_outliers.model import transformer
from beyond_outliers.train import averages, describe, hooks, initialize, loop, processes, rewind
from beyond_outliers.train import program as program_lib
from beyond_outliers.train.program import Program
from beyond_outliers.types import Batch, Json, Params, PathLike

if TYPE_CHECKING:
  from beyond_outliers.checkpoint import Checkpoints

Say = Callable[[str], None]


def run(
  c: config.Config,
  path: PathLike,
  *,
  dry_run: bool = False,
  from_step: int | None = None,
  say: Say | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> str:
  """Trains, or resumes, the run of a workdir; returns its status: done, preempted or diverged.

  from_step: go back to this checkpoint first, and set aside what came later (rewind.py).
  Errors: ConfigError, WorkdirError, CheckpointError, or what the data refuse, before any
    training."""
  say = say or _print_on_first_process
  processes.agree("configuration", _deciding(c, path))
  program = program_lib.build_program(c, devices)
  say(describe.describe(program))
  if dry_run:
    say(describe.describe_compiled(program))
    return "done"
  workdir = workdir_lib.Workdir(path)
  before = workdir.read_config()
  if before is not None:
    config.check_resumable(before, c)
  with workdir.lock(), contextlib.ExitStack() as stack:
    workdir.check()
    if from_step is not None:
      rewind.rewind(workdir, from_step, say)
    return _train(program, workdir, stack, say)


def _deciding(c: config.Config, path: PathLike) -> Json:
  """What the processes of a run must have in common, but for the data."""
  settings = config.flatten({**config.to_dict(c), **workdir_lib.code()})
  return {"--workdir": os.path.abspath(path), **settings}


def _print_on_first_process(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def _train(
  program: Program, workdir: workdir_lib.Workdir, stack: contextlib.ExitStack, say: Say
) -> str:
  """`run` under the workdir's lock. What is open goes onto the stack."""
  from beyond_outliers import checkpoint  # Orbax takes a second, which a dry run does without

  c = program.config
  inputs = _open_inputs(program, say)
  processes.agree("data", _fingerprints(inputs.dataset))
  checkpoints = checkpoint.Checkpoints(workdir.checkpoints, c.checkpoint)
  stack.enter_context(contextlib.closing(inputs.batches))
  stack.enter_context(mesh_lib.use(program.mesh))
  start = initialize.start(program, checkpoints, inputs.batches, say)
  first = int(start.state.step)
  if first >= c.steps:
    say(f"nothing left to do: {workdir.path} is at step {first} of {c.steps}")
    checkpoints.close()
    workdir.set_status("done", first)
    return "done"
  if start.position is not None:
    inputs.batches.restore(start.position)
  manifest = _manifest(program, inputs.dataset, workdir)
  began = time.perf_counter()
  train_step, eval_step = program.compile()
  say(f"compiled the steps in {time.perf_counter() - began:.1f} s")
  peak, peak_source = hardware.peak_flops(c.model.dtype)
  say(
    f"peak: {peak / 1e9:,.0f} GFLOP/s per device in {c.model.dtype} ({peak_source}) · unigram "
    f"entropy of the validation text: {inputs.dataset.unigram_entropy('validation'):.4f} nats · "
    f"workdir: {workdir.path}"
  )
  sinks = _open_sinks(c, workdir, first)
  for sink in sinks:
    stack.callback(sink.close)
  outputs = RunOutputs(workdir, checkpoints, sinks)

  # From here on there is a run: what could be refused has been.
  workdir.write("config.json", config.to_dict(c))
  workdir.write("manifest.json", manifest)
  workdir.set_status("running", first)
  run_hooks = _make_hooks(program, eval_step, peak, inputs, outputs, start, stack)
  placed = (mesh_lib.put_batch(batch, program.mesh, c.batch_size) for batch in inputs.batches)
  status, step, reason = "done", c.steps, ""

  def fail(reason: str) -> None:
    workdir.set_failed(max([first, *checkpoints.steps()]), reason)

  stack.enter_context(processes.last_words(fail))
  try:
    try:
      loop.fit(train_step, start.state, placed, run_hooks, c.steps)
    except loop.Stop as stop:
      status, step, reason = stop.status, stop.step, stop.reason
    checkpoints.close()  # waits; a write that failed in the background raises here
    if status == "done":
      _check_data(inputs.dataset)
  except BaseException as error:
    fail(f"{type(error).__name__}: {error}")
    raise
  workdir.set_status(status, step, reason)
  say(f"{status}{': ' + reason if reason else ''} · {workdir.path}")
  return status


class RunInputs(NamedTuple):
  """The prepared dataset, and the rows of its batches that belong to this process."""

  dataset: data.Dataset
  batches: data.Batches
  validation: data.ValidationBatches


class RunOutputs(NamedTuple):
  """The workdir, its checkpoints, and the writers of metrics: none on processes but the first."""

  workdir: workdir_lib.Workdir
  checkpoints: Checkpoints
  sinks: Sequence[writers.Writer]


def _open_inputs(program: Program, say: Say) -> RunInputs:
  c = program.config
  # Several processes: one does the work, the others wait for its lock.
  dataset = data.prepare(c.data, log=say)
  index, count = mesh_lib.share_of_rows(program.mesh, c.batch_size)
  mine = dict(context=c.context, process_index=index, process_count=count)
  return RunInputs(
    dataset,
    data.train_batches(dataset, c.data, batch_size=c.batch_size, seed=c.seed, **mine),
    data.validation_batches(
      dataset, c.data, batch_size=c.eval.batch_size, documents=c.eval.documents, **mine
    ),
  )


def _check_data(dataset: data.Dataset) -> None:
  """Waits until what was read is compared with its sums. Errors: DataError on every process."""
  problem = ""
  try:
    dataset.sums.wait()
  except data.DataError as error:
    problem = str(error)
  if mesh_lib.on_any_process(bool(problem)):
    raise data.DataError(problem or "another process read damaged data, and says which")


def _open_sinks(c: config.Config, workdir: workdir_lib.Workdir, first: int) -> list[writers.Writer]:
  if jax.process_index() != 0:
    return []
  sinks: list[writers.Writer] = [
    writers.JsonLines(workdir, first),
    writers.Console(c.steps),
    writers.Heartbeat(workdir, first),
  ]
  if c.log.tensorboard:
    sinks.append(writers.TensorBoard(workdir.path / "tensorboard", first))
  if c.log.wandb:
    sinks.append(writers.Wandb(workdir, c.log.wandb, config.to_dict(c)))
  return sinks


def _manifest(program: Program, dataset: data.Dataset, workdir: workdir_lib.Workdir) -> Json:
  """The first start's manifest; every later start of the workdir is listed under `resumed`."""
  now = workdir_lib.manifest(
    {
      "parameters": transformer.count(program.state.params),
      "data": {"directory": os.path.abspath(dataset.directory), **_fingerprints(dataset)},
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
  return {**before, "resumed": [*before.get("resumed", []), now]}


def _fingerprints(dataset: data.Dataset) -> Json:
  return {"fingerprint": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint}


def _make_hooks(
  program: Program,
  eval_step: Any,
  peak_flops: float,
  inputs: RunInputs,
  outputs: RunOutputs,
  start: initialize.Start,
  stack: contextlib.ExitStack,
) -> list[loop.Hook]:
  """Log, evaluations, checkpoints and profile, in the order in which a step meets them."""
  c, sinks = program.config, outputs.sinks
  tokens_per_step, clock = c.batch_size * c.context, loop.Clock(start.seconds)
  log = hooks.LogMetrics(
    c.log.every,
    sinks,
    clock,
    start.state,
    tokens_per_step=tokens_per_step,
    flops_per_step=tokens_per_step * transformer.flops_per_token(c.model, c.context),
    peak_flops=peak_flops * program.mesh.size,
    num_steps=c.steps,
    max_skipped=c.max_skipped_updates,
    statistics=program.statistics,
    sample=_sample(program, inputs.validation),
  )
  periodic = dict(num_steps=c.steps, before=log.flush)
  evaluate = _evaluation(program, eval_step, inputs)
  made: list[loop.Hook] = [log, hooks.Evaluate(c.eval.every, evaluate, sinks, clock, **periodic)]
  if c.average.decay:
    options = dict(name="eval/ema", of=operator.attrgetter("average"))
    made.append(hooks.Evaluate(c.eval.every, evaluate, sinks, clock, **periodic, **options))
  if c.average.last:
    of_last = averages.evaluation_of_last(
      c.average.last, program.state.params, evaluate, outputs.checkpoints
    )
    made.append(hooks.Evaluate(c.steps, of_last, sinks, clock, **periodic, name="eval/last"))
  if c.log.outliers_every:
    measure = _outliers(program, inputs.validation)
    made.append(
      hooks.Evaluate(c.log.outliers_every, measure, sinks, clock, **periodic, name="outliers")
    )
  save = hooks.Save(
    c.checkpoint,
    outputs.checkpoints,
    inputs.batches.state,
    clock,
    tokens_per_step=tokens_per_step,
    **periodic,
  )
  made.append(stack.enter_context(contextlib.closing(save)))
  if c.log.profile_step:
    directory = outputs.workdir.path / "profile"
    profile = hooks.Profile(directory, c.log.profile_step, c.log.profile_steps)
    made.append(stack.enter_context(contextlib.closing(profile)))
  if c.log.watchdog_seconds:
    watchdog = hooks.Watchdog(c.log.watchdog_seconds, outputs.workdir, int(start.state.step))
    made.append(stack.enter_context(contextlib.closing(watchdog)))
  return made


def _evaluation(program: Program, eval_step: Any, inputs: RunInputs) -> Callable[[Params], Json]:
  """params -> metrics on the fixed set of validation documents."""
  c, validation = program.config, inputs.validation
  num_bytes = inputs.dataset.bytes("validation", c.eval.documents)

  def evaluate(params: Params) -> Json:
    def token_losses(batch: Batch):
      placed = mesh_lib.put_batch(batch, program.mesh, validation.batch_size)
      return jax.device_get(eval_step(params, placed))

    return metrics.evaluate(token_losses, validation, num_bytes)

  return evaluate


def _outliers(
  program: Program, validation: data.ValidationBatches
) -> Callable[[Params], dict[str, float]]:
  """params -> metrics of activations, on the fixed set of validation documents, and of weights."""
  from beyond_outliers.evaluate import activations  # only where they are asked for

  measure = activations.on_documents(program.forward, validation, program.mesh)

  def measure_outliers(params: Params) -> dict[str, float]:
    return measure(params, params)

  return measure_outliers


def _sample(program: Program, validation: data.ValidationBatches) -> Batch | None:
  """The first validation windows, one per device that splits a batch.

  Statistics of quantization are of these."""
  c, mesh = program.config, program.mesh
  if not c.log.quant_statistics or not quant.recipes.from_config(c.quant).quantizes:
    return None
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  first = jax.tree.map(lambda x: x[: len(x) * rows // c.eval.batch_size], next(iter(validation)))
  return mesh_lib.put_batch(first, mesh, rows)
