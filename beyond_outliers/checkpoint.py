"""Checkpoints of a run, by Orbax, with SHA-256 sums. The only module that imports Orbax.

A checkpoint N holds the items `state` (the TrainState), `data` (where the data stand, the same for
any number of processes) and `clock` (training seconds, tokens), and sha256.json, the sum of every
file, written after Orbax committed.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from beyond_outliers import config, mesh, quant
from beyond_outliers.errors import CheckpointError
from beyond_outliers.optim import blocks
from beyond_outliers.params import leaves_by_path, path_of, tree_of
from beyond_outliers.types import Json, Params, PathLike
from beyond_outliers.workdir import SUMS, files_below, mismatch, write_sums

# Orbax warns a reader that it only reads.
logging.get_absl_logger().addFilter(
  lambda record: not record.getMessage().startswith("Given directory is read only")
)


class Checkpoints:
  """Checkpoints directory of one run. `read_only` for everybody but the run itself."""

  def __init__(
    self, directory: PathLike, options: config.Checkpoint | None = None, *, read_only: bool = False
  ):
    self.directory = epath.Path(directory).absolute()
    self._verify = options is None or options.verify
    self._read_only = read_only
    if read_only:
      manager_options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False
      )
    else:
      assert options is not None  # only a reader goes without
      self.directory.mkdir(parents=True, exist_ok=True)
      keep: list[preservation_policy.PreservationPolicy] = [
        preservation_policy.LatestN(options.keep)
      ]
      if options.keep_every:
        keep.append(preservation_policy.EveryNSteps(options.keep_every))
      manager_options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=manager_options,
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
    return sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.exists() else []

  def written(self, step: int) -> set[tuple[str, int, int]]:
    """Stamps of a checkpoint's files: (name, bytes, time in seconds).

    Others once it was saved anew, none once it is gone.

    Others once it was saved anew, none once it is gone."""
    directory = self.directory / str(step)
    try:
      found = [(name, (directory / name).stat()) for name in files_below(directory)]
    except FileNotFoundError:
      return set()
    return {(name, file.length, file.mtime) for name, file in found}

  def save(self, step: int, state: Any, data: Json, clock: dict[str, float]) -> None:
    """Begins to write; returns once the arrays are copied. A step is saved once."""
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(mesh.merged_over_processes(data)),
      clock=ocp.args.JsonSave(clock),
    )
    if not self._manager.save(step, args=args, force=True):
      raise CheckpointError(
        f"{self.directory / str(step)}: Orbax did not save it; is another process writing here?"
      )
    if self._verify and jax.process_index() == 0:
      self._seals.append(self._sealer.submit(self._seal, self.directory / str(step)))

  def restore(
    self, state: Any, step: int | None = None
  ) -> tuple[int, Any, Json, dict[str, float]] | None:
    """(step, state, data, clock) of `step`, or of the newest intact checkpoint; None without one.

    state: a tree of ShapeDtypeStructs with shardings. A damaged checkpoint is set aside, as
    damaged-N-..., with a message (left in place when read-only or asked for by step).
    Errors: CheckpointError when `step` is missing or damaged, when all are damaged, or when what is
    stored has other shapes, types or names than `state`."""

    def read(candidate: int) -> Any:
      self._check_structure(candidate, state)
      return self._manager.restore(
        candidate,
        args=ocp.args.Composite(
          # Not strict: the padding of optimizer blocks is cut or grown with zeros, and
          # _check_structure has seen the rest.
          state=ocp.args.StandardRestore(state, strict=False),
          data=ocp.args.JsonRestore(),
          clock=ocp.args.JsonRestore(),
        ),
      )

    if step is None and not self.steps():
      return None
    found, restored = self._newest_intact(step, read)
    return found, restored.state, restored.data, restored.clock

  def restore_params(self, params: Params, step: int | None = None) -> tuple[int, Params]:
    """(step, parameters) alone, on any mesh. params: a tree of ShapeDtypeStructs with shardings.
    Errors: as `restore`, and CheckpointError when there is no checkpoint."""
    partial = {"params": params}

    def read(candidate: int) -> Any:
      self._check_structure(candidate, partial, part="params/")
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
    return found, restored["params"]

  def reached_preemption(self, step: int) -> bool:
    """True once the processes of a distributed run have agreed to stop after this step; every
    process asks every step."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until everything begun is written and sealed.

    Errors of the background writes are raised here."""
    self._manager.wait_until_finished()
    for seal in self._seals:
      seal.result()
    self._seals.clear()

  def close(self) -> None:
    self.wait()
    self._sealer.shutdown()
    self._manager.close()

  def _seal(self, directory: epath.Path) -> None:
    while int(directory.name) not in self.steps():  # until Orbax has committed it
      if not self._manager.is_saving_in_progress() and int(directory.name) not in self.steps():
        return  # the write failed, as wait() will say
      time.sleep(0.02)
    try:
      write_sums(directory)
    except FileNotFoundError:  # the keep policy deleted it meanwhile
      if directory.exists():
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
          damage = (str(error) or type(error).__name__).splitlines()[0]
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
    """Difference of a checkpoint from what was written, empty if none.

    Process 0 reads the files, all learn the answer."""
    verdict = ""
    if self._verify and jax.process_index() == 0:
      directory = self.directory / str(step)
      if (directory / SUMS).exists():
        verdict = mismatch(directory)
      else:
        logging.warning(
          "checkpoint %s has no %s (the run ended before it was written): not verified",
          directory,
          SUMS,
        )
    return mesh.from_first(verdict)

  def _check_structure(self, step: int, state: Any, part: str = "") -> None:
    """Refusal of a checkpoint of another structure.

    Orbax would silently cast another dtype and cut another shape, so names, shapes and dtypes are
    compared first; all, or those below `part`. Blocks of optimizer state are padded to a multiple
    of the devices: the padding may differ."""

    def leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
      named = ((path_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))
      return {
        name: (tuple(x.shape), str(np.dtype(x.dtype))) for name, x in named if name.startswith(part)
      }

    have, want = leaves(self._manager.item_metadata(step)["state"]), leaves(state)
    padded = {
      path_of(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(state)
      if blocks.belongs_to_blocks(path)
    }
    for name in have.keys() & want.keys() & padded:
      (shape, dtype), wanted_shape = have[name], want[name][0]
      have[name] = (wanted_shape[:1] + shape[1:], dtype)
    for name in sorted(have.keys() | want.keys()):
      if have.get(name) != want.get(name):
        raise CheckpointError(
          f"{self.directory / str(step)}: {name} is {have.get(name, 'missing')} in the checkpoint "
          f"and {want.get(name, 'missing')} in this run; was the model or optimizer changed?"
        )

  def _set_aside(self, step: int, damage: str) -> None:
    directory = self.directory / str(step)
    logging.warning(
      "checkpoint %s is damaged (%s); falling back to an older one", directory, damage
    )
    if not self._read_only:
      if jax.process_index() == 0:
        target = directory.parent / f"damaged-{step}-{time.time_ns()}"
        directory.rename(target)
        logging.warning("set aside as %s", target)
      mesh.from_first("renamed")
      self._manager.reload()


def save_quantized(q: quant.QuantizedModel, directory: PathLike) -> None:
  """`q.save` by Orbax: the items `tensors` and `description`, in the form of quant/storage.py."""
  tensors, description = quant.storage.pack_model(q)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(
      epath.Path(directory).absolute(),
      args=ocp.args.Composite(
        tensors=ocp.args.StandardSave(tree_of(tensors)), description=ocp.args.JsonSave(description)
      ),
    )


def load_quantized(directory: PathLike) -> quant.QuantizedModel:
  """The model that `save_quantized` wrote, bit by bit, on the default device.

  Errors: CheckpointError, ConfigError."""
  directory = epath.Path(directory).absolute()
  if not (directory / "description").exists():
    raise CheckpointError(f"{directory}: no quantized model; give what save_quantized wrote")
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    items = reader.restore(
      directory,
      args=ocp.args.Composite(
        tensors=ocp.args.StandardRestore(), description=ocp.args.JsonRestore()
      ),
    )
  tensors = {path: np.asarray(tensor) for path, tensor in leaves_by_path(items.tensors).items()}
  return quant.ptq.restored(tensors, items.description)
