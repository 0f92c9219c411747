"""Wiring of one run, from its configuration to its workdir."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from beyond_outliers import config, data, hardware, stores, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.config.sums import remove_stale
from beyond_outliers.mesh import jax_settings, processes
from beyond_outliers.train import describe, initialize, loop, manifests, rewind
from beyond_outliers.train import program as program_lib
from beyond_outliers.train.program import Program
from beyond_outliers.train.run_hooks import (
  RunInputs,
  RunOutputs,
  check_data,
  fingerprints,
  make_hooks,
)
from beyond_outliers.types import Json, PathLike

if TYPE_CHECKING:
  from beyond_outliers.checkpoint import Checkpoints

Say = Callable[[str], None]
PLACES = ("data.directory", "data.path")  # keys that don't matter, since fingerprints are compared


def run(
  c: config.Config,
  path: PathLike,
  *,
  dry_run: bool = False,
  from_step: int | None = None,
  say: Say | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> str:
  """Trains or resumes the run of a workdir; returns its status: done, preempted or diverged.

  path: a folder, or the address of a store that a local folder is mirrored to (stores/).
  from_step: go back to this checkpoint first, and set aside what came later (rewind.py).
  Errors: ConfigError, WorkdirError, CheckpointError or DataError before any training; DataError
    during it, for damaged data; StoreError at the end, if the store has not received everything.
  """
  jax_settings.check_usable()
  say = say or _print_on_first_process
  flags = {"--from_step": from_step, "--dry_run": dry_run}
  processes.agree("configuration", lambda: {**flags, **_deciding(c, path)})
  program = program_lib.build_program(c, devices)
  say(describe.describe(program))
  if dry_run:
    say(describe.describe_compiled(program))
    return "done"
  workdir = workdir_lib.Workdir(stores.spool(path))
  if not stores.is_address(path):
    _check_resumable(workdir, c)
  with workdir.lock(), contextlib.ExitStack() as stack:
    _remove_stale(workdir)
    where = "BEYOND_OUTLIERS_CACHE" if stores.is_address(path) else "--workdir"
    mesh_lib.check_shared(workdir.path, f"set {where} to a folder that all of them see")
    if stores.is_address(path):
      _mirror(os.fspath(path), workdir, c, stack, say)
      _check_resumable(workdir, c)
    workdir.check()
    if from_step is not None:
      rewind.check_step(workdir, from_step)
    return _train(program, workdir, from_step, stack, say)


def _deciding(c: config.Config, path: PathLike) -> Json:
  """What the processes of a run must have in common, except the data: wherever they are, their
  contents are compared later."""
  settings = config.flatten({**config.to_dict(c), **workdir_lib.code()})
  places = dict.fromkeys(PLACES, "")
  workdir = path if stores.is_address(path) else os.path.abspath(path)
  return {"--workdir": workdir, **settings, **places}


def _remove_stale(workdir: workdir_lib.Workdir) -> None:
  """Removes files that earlier processes of the run left half-written when they were killed; Orbax
  removes unfinished checkpoints."""
  if jax.process_index() == 0:
    below = [folder for folder in workdir.checkpoints.glob("*") if folder.is_dir()]
    for folder in (workdir.path, *below):
      remove_stale(folder)


def _check_resumable(workdir: workdir_lib.Workdir, c: config.Config) -> None:
  before = workdir.read_config()
  if before is not None:
    initialize.check_same_run(before, c, workdir.path)
    jax_settings.check_recorded(workdir.read("manifest.json") or {})


def _mirror(
  address: str,
  workdir: workdir_lib.Workdir,
  c: config.Config,
  stack: contextlib.ExitStack,
  say: Say,
) -> None:
  """Mirrors the workdir until the stack is closed; the first process does so for all.

  Errors: WorkdirError on every process."""
  problem = ""
  if jax.process_index() == 0:
    try:
      stack.enter_context(
        stores.mirrored(address, workdir.path, sealed=c.checkpoint.verify, say=say)
      )
    except workdir_lib.WorkdirError as error:
      problem = str(error)
  problem = mesh_lib.from_first(problem)
  if problem:
    raise workdir_lib.WorkdirError(problem)


def _print_on_first_process(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def _train(
  program: Program,
  workdir: workdir_lib.Workdir,
  from_step: int | None,
  stack: contextlib.ExitStack,
  say: Say,
) -> str:
  """`run` under the workdir's lock. Whatever must be closed goes onto the stack."""
  from beyond_outliers import checkpoint  # importing Orbax takes a second, which a dry run saves

  c = program.config
  inputs = _open_inputs(program, say)
  of_data = fingerprints(inputs.dataset)
  processes.agree("data", lambda: {f"data: {key}": each for key, each in of_data.items()})
  checkpoints = checkpoint.Checkpoints(workdir.checkpoints, c.checkpoint)
  stack.enter_context(contextlib.closing(inputs.batches))
  stack.enter_context(mesh_lib.use(program.mesh))
  start = _start(program, inputs, checkpoints, workdir, from_step, say)
  first, record = int(start.state.step), start.record or {}
  if first >= c.steps:
    say(f"nothing left to do: {workdir.path} is at step {first} of {c.steps}")
    checkpoints.close()
    workdir.set_status("done", first, rows=record.get("rows", ""))
    return "done"
  if start.position is not None:
    inputs.batches.restore(start.position)
  manifest = manifests.of_start(program, inputs.dataset, workdir, start, say)
  steps = _compiled(program, checkpoints, say)
  peak, peak_source = hardware.peak_flops(c.model.dtype)
  say(
    f"peak: {peak / 1e9:,.0f} GFLOP/s per device in {c.model.dtype} ({peak_source}) · unigram "
    f"entropy of the validation text: {inputs.dataset.unigram_entropy('validation'):.4f} nats · "
    f"workdir: {workdir.path}"
  )
  sinks = _open_sinks(c, workdir, first, manifest)
  for sink in sinks:
    stack.callback(sink.close)
  outputs = RunOutputs(workdir, checkpoints, sinks, manifest)

  # From here on the run exists: everything that could be refused has been checked.
  workdir.write("config.json", config.to_dict(c))
  workdir.write("manifest.json", manifest)
  workdir.set_status("running", first)

  def fail(reason: str) -> None:
    with contextlib.suppress(OSError):  # an OSError may be what ends the run
      workdir.set_failed(max([first, *checkpoints.steps()]), reason)

  stack.enter_context(processes.last_words(fail))
  try:
    status, step, reason = _fit(program, *steps, peak, inputs, outputs, start)
  except BaseException as error:
    fail(processes.reason_of(error))
    if isinstance(error, Exception) and jax.process_count() == 1:  # several might wait forever
      with contextlib.suppress(Exception):
        checkpoints.wait()  # for what can still be written: `processes.leave` does not wait
    raise
  workdir.set_status(status, step, reason, writers.rows_sha256(sinks))
  say(f"{status}{': ' + reason if reason else ''} · {workdir.path}")
  return status


def _start(
  program: Program,
  inputs: RunInputs,
  checkpoints: Checkpoints,
  workdir: workdir_lib.Workdir,
  from_step: int | None,
  say: Say,
) -> initialize.Start:
  """The state that the run begins with or continues from; sets aside what came after from_step."""
  if not checkpoints.steps():  # with any, a status that a power failure left empty is harmless
    workdir.check_past()
  of_data = fingerprints(inputs.dataset)
  start = initialize.start(program, checkpoints, inputs.batches, of_data, say, from_step)
  first, record = int(start.state.step), start.record or {}  # older checkpoints have no record
  rows = record.get("rows", "")
  if rows and not writers.check_rows(workdir, first, rows):
    say(f"{workdir.path / 'metrics.jsonl'} is gone; its rows will begin after step {first}")
  if from_step is not None:  # restored by now, so what came after it may be set aside
    rewind.rewind(workdir, from_step, say)
    checkpoints.reload()
  return start


def _compiled(program: Program, checkpoints: Checkpoints, say: Say) -> tuple[Any, Any]:
  """(train step, evaluation step), compiled; also compiles what the first checkpoint needs."""
  began = time.perf_counter()
  steps = program.compile()
  checkpoints.precompile(program.state)
  # One process may find in a cache what another compiles for minutes; on CPUs the first collective
  # would fail after half a minute.
  processes.agree("steps are compiled", dict)
  say(f"compiled the steps in {time.perf_counter() - began:.1f} s")
  return steps


def _fit(
  program: Program,
  train_step: Any,
  eval_step: Any,
  peak: float,
  inputs: RunInputs,
  outputs: RunOutputs,
  start: initialize.Start,
) -> tuple[str, int, str]:
  """Trains to the last step, or until a hook stops the run. Returns (status, step, reason)."""
  c, status, reason = program.config, "done", ""
  step = c.steps
  batches = (mesh_lib.put_batch(batch, program.mesh, c.batch_size) for batch in inputs.batches)
  with contextlib.ExitStack() as stack:  # closed first: no hook may write a status after the last
    run_hooks = make_hooks(program, eval_step, peak, inputs, outputs, start, stack)
    try:
      loop.fit(train_step, start.state, batches, run_hooks, c.steps)
    except loop.Stop as stop:
      status, step, reason = stop.status, stop.step, stop.reason
    outputs.checkpoints.close()  # waits; a write that failed in the background raises here
    if status == "done":
      check_data(inputs.dataset)
  return status, step, reason


def _open_inputs(program: Program, say: Say) -> RunInputs:
  c = program.config
  # With several processes, one prepares and the others wait for its lock.
  dataset = data.prepare(c.data, log=say)
  index, count = mesh_lib.share_of_rows(program.mesh)
  mine = dict(context=c.context, process_index=index, process_count=count)
  return RunInputs(
    dataset,
    data.train_batches(dataset, c.data, batch_size=c.batch_size, seed=c.seed, **mine),
    data.validation_batches(
      dataset, c.data, batch_size=c.eval.batch_size, documents=c.eval.documents, **mine
    ),
  )


def _open_sinks(
  c: config.Config, workdir: workdir_lib.Workdir, first: int, manifest: Json
) -> list[writers.Writer]:
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
    of = manifest.get("id", "")
    sinks.append(writers.Wandb(workdir, c.log.wandb, config.to_dict(c), of))
  return sinks
