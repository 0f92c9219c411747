"""Checkpoints of a run, by Orbax, with SHA-256 sums.
A checkpoint N holds the items `state` (the TrainState), `data` (where the data stand, the same for
any number of processes), `clock` (training seconds, tokens) and `run` (configuration, fingerprints
of the data), and sha256.json, the sum of every file, written after Orbax committed and all that was
to be saved was found in the files.
"""

from __future__ import annotations

import concurrent.futures
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from beyond_outliers import config, mesh
from beyond_outliers import params as params_lib
from beyond_outliers.checkpoint import recovery
from beyond_outliers.checkpoint.reading import check_readable
from beyond_outliers.config.files import make_folder
from beyond_outliers.errors import CheckpointError, WorkdirError
from beyond_outliers.optim import blocks
from beyond_outliers.types import Json, Params, PathLike
from beyond_outliers.workdir import FolderPath, write_sums

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
        "run": ocp.JsonCheckpointHandler(),
      },
    )
    # One thread that writes the sums of a checkpoint once Orbax has committed it.
    self._sealer = concurrent.futures.ThreadPoolExecutor(1, "seal")
    self._seals: list[concurrent.futures.Future] = []

  def steps(self) -> list[int]:
    """Steps of committed checkpoints, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.is_dir() else []

  def save(
    self, step: int, state: Any, data: Json, clock: dict[str, float], run: Json | None = None
  ) -> None:
    """Begins to write; returns once the arrays are copied. Each step once. Errors: as `wait`.

    run: what the run is that saves, so that a checkpoint tells of itself."""
    self.wait()  # as Orbax does; and its keep policy deletes nothing that is still being summed
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(params_lib.without_empty(state)),
      data=ocp.args.JsonSave(mesh.merged_over_processes(data)),
      clock=ocp.args.JsonSave(clock),
      **({"run": ocp.args.JsonSave(run)} if run else {}),
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
        raise recovery.NotFiniteError("its parameters are not finite")
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

  def run_of(self, step: int) -> Json | None:
    """What `save` got as `run`; None of checkpoints that were saved before there was that."""
    if not (self.directory / str(step) / "run").is_dir():
      return None
    items: Any = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
    return items.run

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
      check_readable(directory, "state", shapes, "data", "clock")
      if self._verify:
        write_sums(directory)
    except (CheckpointError, FileNotFoundError):
      if directory.exists():  # nobody deleted it meanwhile
        raise

  def _newest_intact(self, step: int | None, read: Callable[[int], Any]) -> tuple[int, Any]:
    """(step, result of `read`), from the newest intact checkpoint, or from `step` alone."""
    steps = mesh.found_by_first(self.steps)  # others may be deleted meanwhile
    if step not in (None, *steps) or not steps:
      raise CheckpointError(
        f"{self.directory}: no checkpoint {'at all' if step is None else step}; there are {steps}"
      )
    found, result, damaged = recovery.newest_intact(
      self.directory, steps if step is None else [step], read, verify=self._verify
    )
    for each, damage in damaged.items():
      self._set_aside(each, damage)
    if damaged and not self._read_only:
      mesh.from_first("renamed")
      self._manager.reload()
    return found, result

  def _set_aside(self, step: int, damage: str) -> None:
    found = self.directory / str(step)
    logging.warning("checkpoint %s is damaged (%s); falling back to an older one", found, damage)
    if jax.process_index() == 0 and not self._read_only:
      target = self.directory / f"damaged-{step}-{time.time_ns()}"
      found.rename(target)
      logging.warning("set aside as %s", target)

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
