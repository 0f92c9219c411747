"""Checkpoints of a run, by Orbax, with SHA-256 sums. The only module that imports Orbax.

A checkpoint N holds the items `state` (the TrainState), `data` (where the data stand, the same for
any number of processes) and `clock` (training seconds, tokens), and sha256.json, the sum of every
file, written after Orbax committed and all that was to be saved was found in the files.
"""

from __future__ import annotations

import concurrent.futures
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from beyond_outliers import config, mesh, quant
from beyond_outliers import params as params_lib
from beyond_outliers.config.files import make_folder
from beyond_outliers.errors import CheckpointError, WorkdirError
from beyond_outliers.optim import blocks
from beyond_outliers.types import Json, Params, PathLike
from beyond_outliers.workdir import FolderPath, mismatch, write_sums

# Orbax warns a reader that it only reads.
logging.get_absl_logger().addFilter(
  lambda record: not record.getMessage().startswith("Given directory is read only")
)


class Checkpoints:
  """Checkpoints directory of one run. `read_only` for everybody but the run itself."""

  def __init__(
    self, directory: PathLike, options: config.Checkpoint | None = None, *, read_only: bool = False
  ):
    self.directory = FolderPath(directory).absolute()  # Orbax merges what a glob of it finds
    self._verify = options is None or options.verify
    self._read_only = read_only
    if read_only:
      settings = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
      assert options is not None  # only a reader goes without
      make_folder(self.directory, WorkdirError, "give another --workdir")
      newest = ocp.checkpoint_managers.LatestN(options.keep)
      every = ocp.checkpoint_managers.EveryNSteps(options.keep_every or sys.maxsize)
      settings = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([newest, every]),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=settings,
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "clock": ocp.JsonCheckpointHandler(),
      },
    )
    # One thread that writes the sums of a checkpoint once Orbax has committed it.
    self._sealer = concurrent.futures.ThreadPoolExecutor(1, "seal")
    self._seals: list[concurrent.futures.Future] = []

  def steps(self) -> list[int]:
    """Steps of committed checkpoints, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.is_dir() else []

  def save(self, step: int, state: Any, data: Json, clock: dict[str, float]) -> None:
    """Begins to write; returns once the arrays are copied. Each step once. Errors: as `wait`."""
    self.wait()  # as Orbax does; and its keep policy deletes nothing that is still being summed
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(params_lib.without_empty(state)),
      data=ocp.args.JsonSave(mesh.merged_over_processes(data)),
      clock=ocp.args.JsonSave(clock),
    )
    if not self._manager.save(step, args=args, force=True):
      raise CheckpointError(
        f"{self.directory / str(step)}: Orbax did not save it; is another process writing here?"
      )
    if jax.process_index() == 0:
      shapes = params_lib.shapes_by_path(params_lib.without_empty(state))
      self._seals.append(self._sealer.submit(self._seal, self.directory / str(step), shapes))

  def restore(
    self, state: Any, step: int | None = None
  ) -> tuple[int, Any, Json, dict[str, float]] | None:
    """(step, state, data, clock) of `step`, or of the newest intact checkpoint; None without one.

    state: a tree of ShapeDtypeStructs with shardings. A damaged checkpoint, or one whose parameters
    are not finite, is set aside, as damaged-N-..., with a message (left in place when read-only or
    asked for by step).
    Errors: CheckpointError when `step` is missing or damaged, when all are damaged, or when what is
    stored has other shapes, types or names than `state`."""
    stored = params_lib.without_empty(state)

    def read(candidate: int) -> Any:
      self._check_structure(candidate, stored)
      # Not strict: the padding of optimizer blocks is cut or grown with zeros, and
      # _check_structure has seen the rest.
      arrays, text = ocp.args.StandardRestore(stored, strict=False), ocp.args.JsonRestore()
      args = ocp.args.Composite(state=arrays, data=text, clock=text)
      found: Any = self._manager.restore(candidate, args=args)
      if not jax.jit(params_lib.all_finite)(found.state["params"]):
        raise ValueError("its parameters are not finite")
      return found

    if step is None and not self.steps():
      return None
    found, restored = self._newest_intact(step, read)
    return found, params_lib.with_empty(restored.state, state), restored.data, restored.clock

  def restore_params(
    self, params: Params, step: int | None = None, field: str = "params"
  ) -> tuple[int, Params]:
    """(step, parameters) alone, or the `average`, another field of the state that is like them; on
    any mesh. params: a tree of ShapeDtypeStructs with shardings.
    Errors: as `restore`, and CheckpointError when there is no checkpoint."""
    partial = {field: params_lib.without_empty(params)}

    def read(candidate: int) -> Any:
      self._check_structure(candidate, partial, part=f"{field}/")
      with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(
          self.directory / str(candidate) / "state",
          args=ocp.args.PyTreeRestore(
            item=partial,
            restore_args=ocp.checkpoint_utils.construct_restore_args(partial),
            partial_restore=True,
          ),
        )

    found, restored = self._newest_intact(step, read)
    return found, params_lib.with_empty(restored[field], params)

  def reached_preemption(self, step: int) -> bool:
    """True once the processes of a distributed run have agreed to stop after this step; every
    process asks every step."""
    return self._manager.reached_preemption(step)

  def check(self) -> None:
    """Raises what became of checkpoints in the background, as far as it is known by now. Every
    process asks. Errors: CheckpointError for one that cannot be read back."""
    errors = [error for seal in self._seals if seal.done() and (error := seal.exception())]
    if mesh.on_any_process(bool(errors)):
      raise errors[0] if errors else CheckpointError(f"{self.directory}: see the first process")

  def wait(self) -> None:
    """Waits until everything begun is written and sealed. Errors of the background writes are
    raised here, and CheckpointError, see `check`."""
    self._manager.wait_until_finished()
    concurrent.futures.wait(self._seals)
    self.check()
    self._seals.clear()

  def close(self) -> None:
    self.wait()
    self._sealer.shutdown()
    self._manager.close()

  def _seal(self, directory: epath.Path, shapes: params_lib.Shapes) -> None:
    """Sums of a checkpoint that holds arrays of these shapes, once it is committed."""
    while int(directory.name) not in self.steps():  # until Orbax has committed it
      if not self._manager.is_saving_in_progress() and int(directory.name) not in self.steps():
        return  # the write failed, as wait() will say
      time.sleep(0.02)
    try:
      _check_readable(directory, "state", shapes, "data", "clock")
      if self._verify:
        write_sums(directory)
    except (CheckpointError, FileNotFoundError):
      if directory.exists():  # nobody deleted it meanwhile
        raise

  def _newest_intact(self, step: int | None, read: Callable[[int], Any]) -> tuple[int, Any]:
    """(step, result of `read`), from the newest readable checkpoint, or from `step` alone."""
    steps = self.steps()
    if step not in (None, *steps) or not steps:
      raise CheckpointError(
        f"{self.directory}: no checkpoint {'at all' if step is None else step}; there are {steps}"
      )
    for candidate in steps[::-1] if step is None else [step]:
      damage, result = self._damage(candidate), None
      if not damage:
        try:
          result = read(candidate)
        except CheckpointError:  # another structure is no damage
          raise
        except Exception as error:  # Orbax raises all kinds for files that it cannot read
          damage = _reason(error)
      # A process must not fall back while others go on: what one cannot read, none has read.
      if not mesh.on_any_process(bool(damage)):
        return candidate, result
      damage = damage or "another process cannot read it"
      if step is not None:
        raise CheckpointError(f"{self.directory / str(step)} is damaged: {damage}")
      self._set_aside(candidate, damage)
    raise CheckpointError(
      f"{self.directory}: every checkpoint is damaged ({steps}); start in another workdir"
    )

  def _damage(self, step: int) -> str:
    """Difference of a checkpoint from its sums, as process 0 finds it; empty if none."""
    reads = self._verify and jax.process_index() == 0
    return mesh.from_first(mismatch(self.directory / str(step)) if reads else "")

  def _check_structure(self, step: int, state: Any, part: str = "") -> None:
    """Refusal of a checkpoint of another structure.

    Orbax would silently cast another dtype and cut another shape, so names, shapes and dtypes are
    compared first; all, or those below `part`."""
    have = params_lib.shapes_by_path(self._manager.item_metadata(step)["state"], part)
    want = params_lib.shapes_by_path(state, part)
    # Blocks of optimizer state are padded to a multiple of the devices: the padding may differ.
    for name in have.keys() & want.keys() & blocks.block_paths(state):
      have[name] = (want[name][0][:1] + have[name][0][1:], have[name][1])
    if name := params_lib.first_difference(have, want):
      raise CheckpointError(
        f"{self.directory / str(step)}: {name} is {have.get(name, 'missing')} in the checkpoint "
        f"and {want.get(name, 'missing')} in this run; was the model or optimizer changed?"
      )

  def _set_aside(self, step: int, damage: str) -> None:
    found = self.directory / str(step)
    logging.warning("checkpoint %s is damaged (%s); falling back to an older one", found, damage)
    if self._read_only:
      return
    if jax.process_index() == 0:
      target = self.directory / f"damaged-{step}-{time.time_ns()}"
      found.rename(target)
      logging.warning("set aside as %s", target)
    mesh.from_first("renamed")
    self._manager.reload()


def _check_readable(path: epath.Path, item: str, shapes: params_lib.Shapes, *texts: str) -> None:
  """Refusal of what was just saved where Orbax's own reader does not find it in the files: every
  array of `item`, without the values, and the items `texts`, which are JSON."""
  handler, problem = ocp.StandardCheckpointHandler(), ""
  try:
    found = params_lib.shapes_by_path(handler.metadata(path / item).tree)
    if name := params_lib.first_difference(found, shapes):
      problem = f"{name} is {found.get(name, 'missing')}, not {shapes.get(name)}"
    for text in texts:
      ocp.JsonCheckpointHandler().restore(path / text)
  except Exception as error:  # Orbax and TensorStore raise all kinds
    problem = _reason(error)
  if problem:
    raise CheckpointError(
      f"{path}: was saved, and cannot be read back ({problem}); take a folder on another disk"
    )


def _reason(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]


def save_quantized(q: quant.QuantizedModel, directory: PathLike) -> None:
  """`q.save` by Orbax: the items `tensors` and `description`, in the form of quant/storage.py.

  Errors: CheckpointError, also when there is something at the directory."""
  directory = FolderPath(directory).absolute()
  if directory.exists():
    raise CheckpointError(f"{directory}: is there already; remove it or choose another")
  tensors, description = quant.storage.pack_model(q)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(
      directory,
      args=ocp.args.Composite(
        tensors=ocp.args.StandardSave(params_lib.tree_of(tensors)),
        description=ocp.args.JsonSave(description),
      ),
    )
  _check_readable(directory, "tensors", params_lib.shapes_by_path(tensors), "description")


def load_quantized(directory: PathLike) -> quant.QuantizedModel:
  """The model that `save_quantized` wrote, bit by bit, on the default device.

  Errors: CheckpointError, ConfigError."""
  directory = FolderPath(directory).absolute()
  if not (directory / "description").exists():
    raise CheckpointError(f"{directory}: no quantized model; give what save_quantized wrote")
  args = ocp.args.Composite(tensors=ocp.args.StandardRestore(), description=ocp.args.JsonRestore())
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    try:
      items = reader.restore(directory, args=args)
    except Exception as error:  # Orbax raises all kinds for files that it cannot read
      raise CheckpointError(f"{directory} is damaged: {_reason(error)}; copy it again") from error
  if problem := config.files.misfit(items.description, quant.storage.DESCRIPTION_KINDS):
    raise CheckpointError(f"{directory / 'description'}: {problem}; copy it again")
  tensors = params_lib.leaves_by_path(items.tensors)
  return quant.ptq.restored({k: np.asarray(x) for k, x in tensors.items()}, items.description)
