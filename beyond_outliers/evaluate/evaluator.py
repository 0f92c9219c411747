"""Evaluator of a target: measures the missing cells of a plan into self-contained files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax

from beyond_outliers import config, quant, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.config.files import standard_json
from beyond_outliers.errors import TaskError
from beyond_outliers.evaluate import plan, results, table, task_suite
from beyond_outliers.evaluate.model_metrics import ModelMetrics
from beyond_outliers.evaluate.plan import Cell
from beyond_outliers.evaluate.quantization import CheckpointQuantizer, check_calibration
from beyond_outliers.evaluate.results import Result
from beyond_outliers.evaluate.target import Target
from beyond_outliers.mesh import processes
from beyond_outliers.types import Json, Params, PathLike

if TYPE_CHECKING:  # needs the extra `eval`
  from beyond_outliers.evaluate.harness import LoadedTask


def quiet(text: str) -> None:
  """Ignores progress."""


class Evaluator:
  """Measures cells into a folder, the target's own by default. Results under the same settings are
  kept.

  trust_task_code: run the Python that files of the task folders name. calibration_windows: number
    of windows of training data for the methods that need some. propagation: also decompose the
    error of every cell that quantizes (propagation.py). say: receives progress. warn: receives
    lines about broken files and examples left out of tasks.
  Errors: ConfigError for a batch that the devices cannot split, and for more calibration windows
    than there are; and as `task_suite.find_tasks`."""

  def __init__(
    self,
    target: Target,
    cells: Sequence[Cell],
    folder: PathLike | None = None,
    *,
    tasks: Sequence[str] = (),
    task_folders: Sequence[str] = (),
    trust_task_code: bool = False,
    calibration_windows: int = 32,
    propagation: bool = False,
    say: Callable[[str], None] = quiet,
    warn: Callable[[str], None] = results.warn,
  ):
    self.target, self.cells, self._windows = target, list(cells), calibration_windows
    self._store, self._warn = results.ResultStore(folder or target.results_folder, warn), warn
    # Parameters are whole on every device of every process; a batch's rows are split over devices.
    # Every process reads and quantizes the checkpoints itself; only the first one writes.
    mesh = mesh_lib.make_mesh(config.Mesh(-1, 1, 1))
    mesh_lib.check_batch(mesh, "--batch_size", target.text.batch_size)
    if any(cell.calibrated for cell in cells):
      check_calibration(target.text, calibration_windows)
    self._quantize = CheckpointQuantizer(target, calibration_windows, say)
    self._metrics, self._propagates = ModelMetrics(target, mesh, say), propagation
    shown = target.tensorboard if jax.process_index() == 0 else None
    self._sink = writers.TensorBoard(shown, None) if shown else None
    loaded = task_suite.find_tasks(
      tasks, task_folders, target.text.dataset, self._store.path, trust_task_code
    )
    self._suite = task_suite.TaskSuite(loaded, target.text, mesh, say, warn)
    processes.agree("contents", lambda: self._contents(loaded))

  def _contents(self, tasks: Sequence[LoadedTask]) -> Json:
    """What the processes of a job must agree on, wherever each finds it."""
    return {
      "the model of --workdir, --checkpoint or --hf": self.target.identity,
      "the data of --data or the run": self.target.text.dataset.fingerprint,
      **{f"--tasks: {task.name}": task.content for task in tasks},
    }

  def missing(self, step: int) -> list[Cell]:
    """Cells that lack their metrics, a task's scores, or their error propagation."""
    return [
      cell
      for cell in self.cells
      if self._read(step, cell) is None
      or self._tasks_missing(step, cell)
      or self._propagation_missing(step, cell)
    ]

  def make_folder(self) -> None:
    """Makes the folder of the results. Errors: as `ResultStore.make_folder`."""
    self._store.make_folder()

  def results(self, steps: Sequence[int] | None = None) -> list[Result]:
    """The cells measured so far, of these steps or of all, ordered by step."""
    found = {cell["step"] for cell in self._store.cells()} if steps is None else set(steps)
    cells = (self._result(step, cell) for step in sorted(found) for cell in self.cells)
    return [cell for cell in cells if cell is not None]

  def measure(self, step: int, params: Params, cell: Cell) -> Result:
    """Measures what is missing of one cell, and writes it.

    Errors: TaskError, once everything else is written; DataError for damaged data; WriteError;
    GoneError where `params` are no longer the target's; whatever a method raises."""
    began = time.perf_counter()
    q = self._quantize(params, cell)
    jax.block_until_ready(q.params if q else params)
    seconds = {"quantize": time.perf_counter() - began}
    if self._read(step, cell) is None:
      began = time.perf_counter()
      metrics = self._metrics(cell, params, q)
      size = q.size_bytes if q else sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
      seconds["evaluate"] = time.perf_counter() - began
      found: Json = {"metrics": metrics, "size_bytes": size, "seconds": seconds}
      if self.target.average:
        found["averaged"] = self.target.average.steps(step)
      if q and q.fallbacks:
        found["fallbacks"] = [each._asdict() for each in q.fallbacks]
      self._write(step, cell, self._settings(cell), found)
    if q and self._propagation_missing(step, cell):
      found = self._metrics.decompose_error(params, q)
      self._write(step, cell, self._propagation_settings(cell), found)
    failed = self._ask_tasks(step, cell, params, q)
    result = self._result(step, cell)
    assert result is not None, "it was there, or has just been written"
    self._show_on_tensorboard(step, cell, result)
    if failed:
      reasons = [f"{name}: {type(error).__name__}: {error}" for name, error in failed.items()]
      raise TaskError("; ".join(reasons)) from next(iter(failed.values()))
    return result

  def close(self) -> None:
    """Uploads the results, if the run is in a store. Errors: StoreError if that fails."""
    if self._sink:
      self._sink.close()
    self._publish()

  def _publish(self) -> None:
    if self.target.run:
      self.target.run.publish()

  def _ask_tasks(
    self, step: int, cell: Cell, params: Params, q: quant.QuantizedModel | None
  ) -> dict[str, Exception]:
    """Asks the missing tasks and writes their scores; returns the errors of those that failed."""
    model, model_params = (q.model, q.params) if q else (self.target.model, params)
    ask, failed = self._suite.asked_of(model, model_params), {}
    for task in self._tasks_missing(step, cell):
      try:
        scores = ask(task)
      except Exception as error:  # someone else's task may raise anything
        self.target.text.dataset.sums.check()
        processes.raise_alone(error)
        failed[task.name] = error
      else:
        self._write(step, cell, self._task_settings(cell, task), scores)
    return failed

  def _show_on_tensorboard(self, step: int, cell: Cell, result: Result) -> None:
    if self._sink:
      numbers = table.scalars(result).items()
      of = f"{self.target.average.name}/" if self.target.average else ""
      row = {f"{of}{cell.row}/{cell.method}/{name}": value for name, value in numbers}
      self._sink.write({"step": step, **row})

  # ---- results on disk

  def _settings(self, cell: Cell) -> Json:
    return plan.cell_settings(self.target, cell, self._windows)

  def _task_settings(self, cell: Cell, task: LoadedTask) -> Json:
    return plan.task_settings(self.target, cell, self._windows, task)

  def _propagation_settings(self, cell: Cell) -> Json:
    return plan.propagation_settings(self.target, cell, self._windows)

  def _read_propagation(self, step: int, cell: Cell) -> Result | None:
    return self._found(step, cell, self._propagation_settings(cell))

  def _propagation_missing(self, step: int, cell: Cell) -> bool:
    quantizes = cell.method != "none" or self.target.trained_under is not None
    return self._propagates and quantizes and self._read_propagation(step, cell) is None

  def _read(self, step: int, cell: Cell) -> Result | None:
    return self._found(step, cell, self._settings(cell))

  def _read_task(self, step: int, cell: Cell, task: LoadedTask) -> Result | None:
    return self._found(step, cell, self._task_settings(cell, task))

  def _found(self, step: int, cell: Cell, settings: Json) -> Result | None:
    digest = self.target.digest(step)  # a run that was rewound may have reached the step again
    return self._store.read(step, cell.row, cell.method, settings, digest)

  def _tasks_missing(self, step: int, cell: Cell) -> list[LoadedTask]:
    return [task for task in self._suite.tasks if self._read_task(step, cell, task) is None]

  def _result(self, step: int, cell: Cell) -> Result | None:
    """The cell with the tasks measured so far; None where the cell itself is missing."""
    found = self._read(step, cell)
    tasks = [self._read_task(step, cell, task) for task in self._suite.tasks]
    if self._propagates:
      tasks.append(self._read_propagation(step, cell))
    if found is None:
      return None
    return results.joined(found, [task for task in tasks if task is not None])

  def _write(self, step: int, cell: Cell, settings: Json, found: Json) -> None:
    self.target.text.dataset.sums.wait()  # no result on damaged data is kept
    digest = self.target.check_read(step)  # nor one that would pass for other parameters'
    result = {
      "step": step,
      **cell._asdict(),
      **standard_json(found),
      "settings": settings,
      **({results.PARAMETERS: digest} if digest else {}),
      "source": self.target.origin,
      **workdir_lib.manifest({}),
    }
    self._store.write(step, cell.row, cell.method, settings, result)
    try:
      self._publish()
    except OSError as error:
      self._warn(f"{error}; the result is in {self._store.path}, to be uploaded later")
