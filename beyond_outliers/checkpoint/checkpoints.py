"""Checkpoints of a run, written by Orbax, with digests of their arrays and sums of their files.

Checkpoint N holds the items `state` (the TrainState), `data` (the position in the data, the same
for any number of processes), `clock` (training seconds, tokens), `run` (configuration, fingerprints
of the data) and `digests`, all committed at once; and sha256.json, the sums of all files, written
once Orbax has committed and the files were found to hold everything. Digests are computed from the
arrays before writing, so they also reveal errors up to the commit. The sums can be compared without
restoring anything, and tell damage from files that just cannot be read now.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from beyond_outliers import config, mesh
from beyond_outliers import params as params_lib
from beyond_outliers.checkpoint import digests, reading, recovery
from beyond_outliers.checkpoint.handlers import telling
from beyond_outliers.checkpoint.retention import TEMPORARY, delete_replaced, is_temporary
from beyond_outliers.config.files import make_folder
from beyond_outliers.errors import CheckpointError, NotFiniteError, WorkdirError
from beyond_outliers.types import Json, Params, PathLike
from beyond_outliers.workdir import FolderPath, write_sums

# Drops Orbax's warning to read-only users that the directory is read-only.
logging.get_absl_logger().addFilter(
  lambda record: not record.getMessage().startswith("Given directory is read only")
)

TEXTS = ("data", "clock", "run", "digests", TEMPORARY)  # items that are JSON


class Checkpoints:
  """Checkpoints directory of a run. read_only: for all but the run itself; hides temporary ones."""

  def __init__(
    self, directory: PathLike, options: config.Checkpoint | None = None, *, read_only: bool = False
  ):
    self.directory = FolderPath(directory).absolute()  # Orbax looks for files by globbing it
    self._options, self._read_only = options, read_only
    self._verify = options is None or options.verify
    self._errors: list[Exception] = []  # from this process's writes in the background
    if read_only:
      self.steps()  # raises if the directory cannot be listed
      settings = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
      assert options is not None  # only a reader has none
      make_folder(self.directory, WorkdirError, "give another --workdir")
      # Orbax would delete older checkpoints as soon as the next is committed. `_seal` does so
      # instead, once that is known to be readable.
      settings = ocp.CheckpointManagerOptions(
        max_to_keep=None, cleanup_tmp_directories=True, enable_async_checkpointing=True
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=settings,
      item_handlers={
        "state": telling(ocp.StandardCheckpointHandler(), self._errors),
        **{name: telling(ocp.JsonCheckpointHandler(), self._errors) for name in TEXTS},
      },
    )
    # One thread that writes a checkpoint's sums once Orbax has committed it.
    self._sealer = concurrent.futures.ThreadPoolExecutor(1, "seal")
    self._seals: list[concurrent.futures.Future] = []

  def steps(self) -> list[int]:
    """Steps of committed checkpoints, oldest first."""
    found = reading.committed_steps(self.directory)
    return sorted(step for step in found if not self._read_only or not self._is_temporary(step))

  def lasting_steps(self) -> list[int]:
    """Steps of the checkpoints that the next save does not replace."""
    return [step for step in self.steps() if not self._is_temporary(step)]

  def _is_temporary(self, step: int) -> bool:
    return is_temporary(self.directory / str(step))

  def precompile(self, state: Any) -> None:
    """Compiles what the first `save` would compile. state: as in `restore`."""
    digests.precompile(params_lib.without_empty(state))

  def save(
    self,
    step: int,
    state: Any,
    data: Json,
    clock: dict[str, float],
    run: Json | None = None,
    *,
    temporary: bool = False,
  ) -> None:
    """Begins to write a checkpoint; returns once the arrays are copied. A step is saved only once.

    run: a description of the run to store with the checkpoint. temporary: kept only until the next
      save.
    Errors: those of `wait`, and NotFiniteError, on every process."""
    self.wait()  # as Orbax does; also, nothing is deleted while its sums are being computed
    arrays = params_lib.without_empty(state)
    contents = digests.examine(arrays)
    if contents.not_finite:
      raise NotFiniteError(f"{contents.not_finite} is not finite, and is not saved")
    texts: dict[str, Any] = {"data": mesh.merged_over_processes(data), "clock": clock}
    texts |= {"run": run} if run else {}
    if self._verify:
      texts["digests"] = {"step": step, **digests.record(contents.digests, texts)}
    if temporary:
      texts[TEMPORARY] = {"temporary": True}
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(arrays),
      **{name: ocp.args.JsonSave(text) for name, text in texts.items()},
    )
    if not self._manager.save(step, args=args, force=True):
      raise CheckpointError(
        f"{self.directory / str(step)}: Orbax did not save it; is another process writing here?"
      )
    shapes = params_lib.shapes_by_path(arrays)
    self._seals.append(self._sealer.submit(self._seal, self.directory / str(step), shapes, texts))

  def restore(
    self, state: Any, step: int | None = None
  ) -> tuple[int, Any, Json, dict[str, float]] | None:
    """(step, state, data, clock) of `step`, or of the newest intact checkpoint; None without any.

    state: a tree of ShapeDtypeStructs with shardings. A checkpoint that is damaged or not finite is
    set aside as damaged-N-..., with a message (left in place if read-only or asked for by step).
    Errors: CheckpointError when `step` is missing or damaged, when all are damaged, or when what is
    stored has other shapes, types or names than `state`."""
    stored = params_lib.without_empty(state)

    def read(candidate: int) -> Any:
      self._check_structure(candidate, stored)
      # Not strict: padding of optimizer blocks may be cut, or grown with zeros; check_structure has
      # compared everything else.
      arrays, text = ocp.args.StandardRestore(stored, strict=False), ocp.args.JsonRestore()
      texts = dict.fromkeys(["data", "clock", *["run"] * self._has(candidate, "run")], text)
      args = ocp.args.Composite(state=arrays, **texts)
      found: Any = self._manager.restore(candidate, args=args)
      contents = digests.examine(found.state)
      self._compare(candidate, contents, {name: found[name] for name in texts})
      if contents.not_finite:
        raise recovery.UnusableError(f"{contents.not_finite} is not finite")
      return found

    if step is None and not self.steps():
      return None
    found, restored = self._newest_intact(step, read)
    return found, params_lib.with_empty(restored.state, state), restored.data, restored.clock

  def restore_params(
    self, params: Params, step: int | None = None, field: str = "params", identity: str = ""
  ) -> tuple[int, Params]:
    """(step, parameters) alone, on any mesh; or instead of them a `field` of the state that is like
    them, such as `average`.

    params: a tree of ShapeDtypeStructs with shardings. identity: of the run that must have saved
      them, if known.
    Errors: those of `restore`; CheckpointError also if there is no checkpoint, or another run's."""
    partial = {field: params_lib.without_empty(params)}

    def read(candidate: int) -> Any:
      self._check_structure(candidate, partial, part=f"{field}/")
      with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(
          self.directory / str(candidate) / "state",
          args=ocp.args.PyTreeRestore(
            item=partial,
            restore_args=ocp.checkpoint_utils.construct_restore_args(partial),
            partial_restore=True,
          ),
        )
      self._compare(candidate, digests.examine(found))
      recovery.check_run(self.directory / str(candidate), identity)  # last, to cover `found`
      return found

    found, restored = self._newest_intact(step, read)
    return found, params_lib.with_empty(restored[field], params)

  def reload(self) -> None:
    """Lists the checkpoints anew, after something other than this object has moved some."""
    self._manager.reload()

  def run_of(self, step: int) -> Json | None:
    """What `save` got as `run`; None for checkpoints from before it was stored."""
    return reading.read_run(self.directory / str(step))

  def reached_preemption(self, step: int) -> bool:
    """Whether the processes of a distributed run have agreed to stop after this step; every process
    must ask at every step."""
    return self._manager.reached_preemption(step)

  def check(self) -> None:
    """Raises errors of checkpoints saved in the background, as far as this process knows by now.

    Errors: CheckpointError for one that cannot be read back, OSError for one that could not be
    written."""
    if self._errors or any(seal.done() and not seal.result() for seal in self._seals):
      self._wait_for_orbax()  # raises Orbax's error; errors of sealing were raised by result()

  def wait(self) -> None:
    """Waits until all saves are written and sealed. Errors: those of `check`, on every process."""
    self._wait_for_orbax()
    concurrent.futures.wait(self._seals)
    errors = [error for seal in self._seals if (error := seal.exception())]
    if mesh.on_any_process(bool(errors)):
      raise errors[0] if errors else CheckpointError(f"{self.directory}: see process 0's message")
    self._seals.clear()

  def close(self) -> None:
    self.wait()
    self._sealer.shutdown()
    self._manager.close()

  def _wait_for_orbax(self) -> None:
    try:
      while self._manager.is_saving_in_progress():
        if self._errors and jax.process_count() > 1:
          raise self._errors[0]  # Orbax would wait for other processes, which wait for this one
        time.sleep(0.01)
      self._manager.wait_until_finished()
    except Exception as error:  # Orbax and TensorStore raise all kinds
      raise OSError(
        f"{self.directory}: the checkpoint being saved could not be written "
        f"({reading.reason(error)}); earlier ones are intact: free what has run out, and give the "
        "same command"
      ) from error

  def _seal(
    self, directory: epath.Path, shapes: params_lib.Shapes, texts: Mapping[str, Any]
  ) -> bool:
    """Once a checkpoint is committed, checks that it can be read, writes its sums, and deletes the
    checkpoints that it replaces. False: it was not committed; Orbax has the reason."""
    assert self._options is not None  # only a reader has none, and it saves nothing
    while int(directory.name) not in self.steps():  # until Orbax has committed it
      if not self._manager.is_saving_in_progress() and int(directory.name) not in self.steps():
        return False
      time.sleep(0.02)
    if jax.process_index() != 0:
      return True
    try:
      reading.check_readable(directory, "state", shapes, texts)
      if self._verify:
        write_sums(directory)
    except (CheckpointError, FileNotFoundError):
      if directory.exists():  # otherwise someone deleted it meanwhile
        raise
    else:
      delete_replaced(directory, self.steps(), self._options)
    return True

  def _has(self, step: int, item: str) -> bool:
    return (self.directory / str(step) / item).is_dir()

  def _compare(
    self, step: int, contents: digests.Contents, texts: Mapping[str, Any] | None = None
  ) -> None:
    """Compares contents with the digests, which older checkpoints lack. Errors: UnusableError."""
    if self._verify and self._has(step, "digests"):
      recovery.compare_contents(self.directory / str(step), contents, texts)

  def _newest_intact(self, step: int | None, read: Callable[[int], Any]) -> tuple[int, Any]:
    """(step, result of `read`), for the newest intact checkpoint, or only for `step` if given."""
    steps = mesh.found_by_first(self.steps)  # on the others some may be deleted by now
    if step not in (None, *steps) or not steps:
      raise CheckpointError(
        f"{self.directory}: no checkpoint {'at all' if step is None else step}; there are {steps}"
      )
    remedy = "restore one from a copy, or start in another workdir"
    if step is not None:
      steps, remedy = [step], "restore it from a copy, or use another step"
    found, result, damaged = recovery.newest_intact(
      self.directory, steps, read, remedy, verify=self._verify
    )
    for each, damage in damaged.items():
      self._set_aside(each, damage)
    if damaged and not self._read_only:
      mesh.from_first("renamed")
      self.reload()
    return found, result

  def _set_aside(self, step: int, damage: str) -> None:
    found = self.directory / str(step)
    logging.warning("checkpoint %s is damaged (%s); falling back to an older one", found, damage)
    if jax.process_index() == 0 and not self._read_only:
      target = self.directory / f"damaged-{step}-{time.time_ns()}"
      found.rename(target)
      logging.warning("set aside as %s", target)

  def _check_structure(self, step: int, state: Any, part: str = "") -> None:
    stored = self._manager.item_metadata(step)["state"]
    reading.check_structure(self.directory / str(step), stored, state, part)
