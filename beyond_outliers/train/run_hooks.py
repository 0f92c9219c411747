"""The hooks of a run, which log, evaluate and save, made from its program, inputs and outputs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from beyond_outliers import config, data, quant, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.evaluate import metrics
from beyond_outliers.model import transformer
from beyond_outliers.train import averages, hooks, initialize, loop
from beyond_outliers.train.program import Program
from beyond_outliers.types import Batch, Json, Params

if TYPE_CHECKING:
  from beyond_outliers.checkpoint import Checkpoints


class RunInputs(NamedTuple):
  """The prepared dataset, and batches with the rows that belong to this process."""

  dataset: data.Dataset
  batches: data.Batches
  validation: data.ValidationBatches


class RunOutputs(NamedTuple):
  """The workdir, its checkpoints, its manifest, and the writers of metrics, which only the first
  process has."""

  workdir: workdir_lib.Workdir
  checkpoints: Checkpoints
  sinks: Sequence[writers.Writer]
  manifest: Json


def fingerprints(dataset: data.Dataset) -> Json:
  return {"fingerprint": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint}


def check_data(dataset: data.Dataset) -> None:
  """Waits until all data read so far are checked against their sums.

  Errors: DataError, on every process."""
  problem = ""
  try:
    dataset.sums.wait()
  except data.DataError as error:
    problem = str(error)
  if mesh_lib.on_any_process(bool(problem)):
    raise data.DataError(problem or "another process read damaged data, and says which")


def make_hooks(
  program: Program,
  eval_step: Any,
  peak_flops: float,
  inputs: RunInputs,
  outputs: RunOutputs,
  start: initialize.Start,
  stack: contextlib.ExitStack,
) -> list[loop.Hook]:
  """Hooks for log, evaluations, checkpoints, profile and watchdog, in the order in which they run.

  peak_flops: FLOP/s of a device. stack: closes the hooks that need it."""
  c, clock = program.config, loop.Clock(start.seconds)
  log = _log(program, peak_flops, inputs, outputs, start, clock)
  periodic = dict(num_steps=c.steps, before=log.flush)
  made: list[loop.Hook] = [log]
  made += _evaluations(program, eval_step, inputs, outputs, clock, periodic)
  save = _save(program, inputs, outputs, clock, periodic)
  made.append(stack.enter_context(contextlib.closing(save)))
  if c.log.profile_step:
    directory = outputs.workdir.path / "profile"
    profile = hooks.Profile(directory, c.log.profile_step, c.log.profile_steps)
    made.append(stack.enter_context(contextlib.closing(profile)))
  if c.log.watchdog_seconds:
    watchdog = hooks.Watchdog(c.log.watchdog_seconds, outputs.workdir, int(start.state.step))
    made.append(stack.enter_context(contextlib.closing(watchdog)))
  return made


def _log(
  program: Program,
  peak_flops: float,
  inputs: RunInputs,
  outputs: RunOutputs,
  start: initialize.Start,
  clock: loop.Clock,
) -> hooks.LogMetrics:
  c = program.config
  tokens_per_step = c.batch_size * c.context
  return hooks.LogMetrics(
    c.log.every,
    outputs.sinks,
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


def _evaluations(
  program: Program,
  eval_step: Any,
  inputs: RunInputs,
  outputs: RunOutputs,
  clock: loop.Clock,
  periodic: dict[str, Any],
) -> list[loop.Hook]:
  """Hooks for the validation loss of the parameters and of their averages, and for outliers.

  periodic: arguments of all periodic hooks."""
  c, sinks = program.config, outputs.sinks
  evaluate = _evaluation(program, eval_step, inputs)
  made: list[loop.Hook] = [hooks.Evaluate(c.eval.every, evaluate, sinks, clock, **periodic)]
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
  return made


def _save(
  program: Program,
  inputs: RunInputs,
  outputs: RunOutputs,
  clock: loop.Clock,
  periodic: dict[str, Any],
) -> hooks.Save:
  c = program.config
  settings = config.to_dict(c)

  def data_state() -> Json:
    check_data(inputs.dataset)  # a run resumed from here must not have seen damaged data
    return inputs.batches.state()

  def record() -> Json:
    """What a checkpoint records about its run."""
    return {
      "config": settings,
      "data": fingerprints(inputs.dataset),
      "manifest": {**outputs.manifest, "resumed": []},
      "rows": writers.rows_sha256(outputs.sinks),
    }

  return hooks.Save(
    c.checkpoint,
    outputs.checkpoints,
    data_state,
    clock,
    tokens_per_step=c.batch_size * c.context,
    record=record,
    rows_every=c.log.every,
    **periodic,
  )


def _evaluation(program: Program, eval_step: Any, inputs: RunInputs) -> Callable[[Params], Json]:
  """A function params -> metrics on the fixed set of validation documents."""
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
  """A function params -> outlier metrics of weights, and of activations on the fixed set of
  validation documents."""
  from beyond_outliers.evaluate import activations  # imported only if needed

  measure = activations.on_documents(program.forward, validation, program.mesh)

  def measure_outliers(params: Params) -> dict[str, float]:
    return measure(params, params)

  return measure_outliers


def _sample(program: Program, validation: data.ValidationBatches) -> Batch | None:
  """The batch for quantization statistics: the first validation windows, one per shard of a batch;
  None if there are no such statistics."""
  c, mesh = program.config, program.mesh
  if not c.log.quant_statistics or not quant.recipes.from_config(c.quant).quantizes:
    return None
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  first = jax.tree.map(lambda x: x[: len(x) * rows // c.eval.batch_size], next(iter(validation)))
  return mesh_lib.put_batch(first, mesh, rows)
