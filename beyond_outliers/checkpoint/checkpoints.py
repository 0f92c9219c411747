"""Checkpoints of a run, by Orbax, with digests of what they hold and sums of their files.

A checkpoint N holds the items `state` (the TrainState), `data` (where the data stand, the same for
any number of processes), `clock` (training seconds, tokens), `run` (configuration, fingerprints of
the data) and `digests`, all committed at once; and sha256.json, the sum of every file, written
after Orbax committed and all that was to be saved was found in the files. The digests, made of the
arrays before these are written, show what went wrong before that, too; the sums can be compared
without restoring anything, and tell damage from what only cannot be read now.
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

# Orbax warns a reader that it only reads.
logging.get_absl_logger().addFilter(
  lambda record: not record.getMessage().startswith("Given directory is read only")
)

TEXTS = ("data", "clock", "run", "digests", TEMPORARY)  # items that are JSON


class Checkpoints:
  """Checkpoints directory of one run. `read_only` for everybody but the run itself: to them there
  are no temporary ones."""

  def __init__(
    self, directory: PathLike, options: config.Checkpoint | None = None, *, read_only: bool = False
  ):
    self.directory = FolderPath(directory).absolute()  # Orbax merges what a glob of it finds
    self._options, self._read_only = options, read_only
    self._verify = options is None or options.verify
    self._errors: list[Exception] = []  # of what this process writes in the background
    if read_only:
      self.steps()  # which refuses what cannot be listed
      settings = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
      assert options is not None  # only a reader goes without
      make_folder(self.directory, WorkdirError, "give another --workdir")
      # Orbax would delete older ones as soon as it committed the next: `_seal` does, once that is
      # found to be readable.
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
    # One thread that writes the sums of a checkpoint once Orbax has committed it.
    self._sealer = concurrent.futures.ThreadPoolExecutor(1, "seal")
    self._seals: list[concurrent.futures.Future] = []

  def steps(self) -> list[int]:
    """Steps of committed checkpoints, oldest first."""
    found = reading.committed_steps(self.directory)
    return sorted(step for step in found if not self._read_only or not self._is_temporary(step))

  def lasting_steps(self) -> list[int]:
    """Those that the next save does not replace."""
    return [step for step in self.steps() if not self._is_temporary(step)]

  def _is_temporary(self, step: int) -> bool:
    return is_temporary(self.directory / str(step))

  def precompile(self, state: Any) -> None:
    """Compiles what the first `save` would. state: as of `restore`."""
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
    """Begins to write; returns once the arrays are copied. Each step once. Errors: as `wait`, and
    NotFiniteError, on every process.

    run: what the run is, so that a checkpoint tells of itself. temporary: until the next save."""
    self.wait()  # as Orbax does; and nothing is deleted that is still being summed
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
    """(step, state, data, clock) of `step`, or of the newest intact checkpoint; None without one.

    state: a tree of ShapeDtypeStructs with shardings. A damaged checkpoint, or one that holds what
    is not finite, is set aside, as damaged-N-..., with a message (left in place when read-only or
    asked for by step).
    Errors: CheckpointError when `step` is missing or damaged, when all are damaged, or when what is
    stored has other shapes, types or names than `state`."""
    stored = params_lib.without_empty(state)

    def read(candidate: int) -> Any:
      self._check_structure(candidate, stored)
      # Not strict: the padding of optimizer blocks is cut or grown with zeros, and
      # check_structure has seen the rest.
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
    """(step, parameters) alone, or the `average`, another field of the state that is like them; on
    any mesh. params: a tree of ShapeDtypeStructs with shardings. identity: of the run that is to
    have saved them, where it is known.
    Errors: as `restore`, and CheckpointError when there is none, or it is another run's."""
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
      recovery.check_run(self.directory / str(candidate), identity)  # last: what was read is its
      return found

    found, restored = self._newest_intact(step, read)
    return found, params_lib.with_empty(restored[field], params)

  def reload(self) -> None:
    """Looks anew which checkpoints there are, once others than this moved some."""
    self._manager.reload()

  def run_of(self, step: int) -> Json | None:
    """What `save` got as `run`; None of checkpoints that were saved before there was that."""
    return reading.read_run(self.directory / str(step))

  def reached_preemption(self, step: int) -> bool:
    """True once the processes of a distributed run have agreed to stop after this step; every
    process asks every step."""
    return self._manager.reached_preemption(step)

  def check(self) -> None:
    """Raises the errors of writing in the background, as far as this process knows them by now.

    Errors: CheckpointError for one that cannot be read back, OSError for one that could not be
    written."""
    if self._errors or any(seal.done() and not seal.result() for seal in self._seals):
      self._wait_for_orbax()  # or a result has raised what sealing did

  def wait(self) -> None:
    """Waits until everything begun is written and sealed. Errors: as `check`, on every process."""
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
          raise self._errors[0]  # at once: Orbax waits for others, which wait for this one
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
    """Sums of a checkpoint that holds arrays of these shapes, once it is committed; then those that
    it replaces are deleted. False: it was not committed, and Orbax knows why."""
    assert self._options is not None  # of a reader, which saves nothing
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
      if directory.exists():  # nobody deleted it meanwhile
        raise
    else:
      delete_replaced(directory, self.steps(), self._options)
    return True

  def _has(self, step: int, item: str) -> bool:
    return (self.directory / str(step) / item).is_dir()

  def _compare(
    self, step: int, contents: digests.Contents, texts: Mapping[str, Any] | None = None
  ) -> None:
    """Errors: UnusableError for what differs from the digests, of checkpoints since there are."""
    if self._verify and self._has(step, "digests"):
      recovery.compare_contents(self.directory / str(step), contents, texts)

  def _newest_intact(self, step: int | None, read: Callable[[int], Any]) -> tuple[int, Any]:
    """(step, result of `read`), from the newest intact checkpoint, or from `step` alone."""
    steps = mesh.found_by_first(self.steps)  # others may be deleted meanwhile
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
