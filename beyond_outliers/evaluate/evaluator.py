"""What quantization after training costs a checkpoint: a cell a (step, recipe, method), each a JSON
file that is read alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from beyond_outliers import cli, config, data, quant, writers
from beyond_outliers import mesh as mesh_lib
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.config.checks import require
from beyond_outliers.errors import ConfigError, TaskError
from beyond_outliers.evaluate import activations, metrics, offline_tasks, results, steps
from beyond_outliers.evaluate.results import Result
from beyond_outliers.evaluate.target import Source
from beyond_outliers.model import transformer

VERSION = (
  2  # of the measurements: raised by whatever changes their numbers; then all is measured anew
)
SEED = 0  # of the calibration windows and of the bootstrap: the same for every run

OWN_REFERENCE = "method none: difference, KL and agreement are to the same parameters with nothing quantized, not to another run"


class Cell(NamedTuple):
  """What is done to a checkpoint. method "none": nothing, it is judged as it was trained, under its
  own recipe."""

  recipe: (
    str  # row of quant.RECIPES; where the model was trained under rules of its own, with these
  )
  method: str

  @property
  def calibrated(self) -> bool:
    return self.method != "none" and quant.ptq.method_named(self.method).calibrated

  @property
  def row(self) -> str:
    """The recipe without the rules of a run, which is told by other means."""
    return self.recipe.partition(",")[0]


def check_names(recipes: Sequence[str], methods: Sequence[str]) -> None:
  """Errors: ConfigError for one that nobody knows."""
  for name in recipes:
    require(
      name != "none",
      "--recipes",
      name,
      "the model as it was trained is evaluated anyway; leave it out",
    )
    quant.recipes.recipe_named(name, "--recipes")
  for name in methods:
    quant.ptq.method_named(name, "--methods")


def plan(source: Source, recipes: Sequence[str], methods: Sequence[str]) -> list[Cell]:
  """The model as it is, then every method under every recipe.

  Errors: ConfigError for unknown names, recipes that do not fit the model or a method, and any for
  a model that was trained quantized; before any checkpoint is read."""
  check_names(recipes, methods)
  require(
    not recipes or source.trained_under is None,
    "--recipes",
    ",".join(recipes),
    f"methods begin with a model in full "
    f"precision, and this one was trained under {source.recipe!r}; leave --recipes and --methods "
    "out to evaluate it as it "
    "was trained, or give the run of its full-precision twin (quant.recipe = 'none')",
  )
  shapes = transformer.shapes(source.model)
  pairs = [
    Cell(*pair) for pair in itertools.product(dict.fromkeys(recipes), dict.fromkeys(methods))
  ]
  for recipe, method in pairs:
    try:
      quant.ptq.check_quantizable(source.model, shapes, quant.RECIPES[recipe], method)
    except ConfigError as error:
      raise ConfigError(f"--recipes = {recipe!r} with --methods = {method!r}: {error}") from None
  return [Cell(source.recipe, "none"), *pairs]


class Evaluator:
  """Measures cells into a folder, the source's own by default. What was measured under the same
  settings stays as it is.

  windows: of training data that methods look at. say: takes progress. warn: takes what should be
    seen.
  Errors: ConfigError for a batch that the devices cannot split, tasks that are unknown, faulty or
  without their data, and tasks without the library for them."""

  def __init__(
    self,
    source: Source,
    cells: Sequence[Cell],
    folder: Any = None,
    *,
    tasks: Sequence[str] = (),
    task_folders: Sequence[str] = (),
    windows: int = 32,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = results.warn,
  ):
    self.source, self.cells, self._windows, self._say = source, list(cells), windows, say
    self._folder = results.Folder(folder or source.folder, warn)
    # Parameters whole on every device, rows of a batch split over them.
    self._mesh = mesh_lib.make_mesh(config.Mesh(-1, 1, 1), jax.local_devices())
    mesh_lib.check_batch(self._mesh, "--batch_size", source.batch_size)
    self._batches = data.validation_batches(
      source.dataset,
      source.data,
      context=source.context,
      batch_size=source.batch_size,
      documents=source.documents,
    )
    self._num_bytes = source.dataset.bytes("validation", source.documents)
    self._sink = writers.TensorBoard(source.tensorboard, None) if source.tensorboard else None
    self._steps: dict[Cell, Any] = {}  # compiled once, for all checkpoints
    self._measure_outliers: Any = None  # the same
    self._tasks = _load(tasks, task_folders, source.dataset, self._folder.path) if tasks else []

  def missing(self, step: int) -> list[Cell]:
    return [
      cell
      for cell in self.cells
      if self._read(step, cell, self._settings(cell)) is None or self._unasked(step, cell)
    ]

  def results(self, steps: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The cells that are there, of these steps or of all, by step."""
    found = {cell["step"] for cell in self._folder.cells()} if steps is None else set(steps)
    cells = (self._result(step, cell) for step in sorted(found) for cell in self.cells)
    return [cell for cell in cells if cell is not None]

  def measure(self, step: int, params: Any, cell: Cell) -> dict[str, Any]:
    """Measures what is missing of one cell and writes it. Errors: TaskError once all else is
    written; what a method raises."""
    began = time.perf_counter()
    q = self._quantized(params, cell)
    model, q_params = (q.model, q.params) if q else (self.source.model, params)
    jax.block_until_ready(q_params)
    quantized = time.perf_counter()
    if self._read(step, cell, self._settings(cell)) is None:
      metrics = self._metrics(cell, params, q)
      if cell.method == "none":
        metrics |= self._outliers(model, q_params, params)
      size = q.size_bytes if q else sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
      seconds = {"quantize": quantized - began, "evaluate": time.perf_counter() - quantized}
      self._write(
        step,
        cell,
        self._settings(cell),
        {"metrics": metrics, "size_bytes": size, "seconds": seconds},
      )
    failed: list[tuple[str, Exception]] = []
    asked = functools.cache(
      lambda: self._harness_model(model, q_params)
    )  # one for all tasks, if there are any
    for task in self._unasked(step, cell):
      try:
        self._ask(step, cell, task, asked)
      except Exception as error:  # whatever a task of others raises
        failed.append((task.name, error))
    found: Any = self._result(step, cell)
    if self._sink:
      self._sink.write(
        {
          "step": step,
          **{f"{cell.row}/{cell.method}/{name}": value for name, value in scalars(found).items()},
        }
      )
    if failed:
      raise TaskError(
        "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed)
      ) from failed[0][1]
    return found

  def _harness_model(self, model: Any, params: Any) -> Any:
    source, placed = self.source, jax.device_put(params, mesh_lib.replicated(self._mesh))
    return _zero_shot().harness_model(
      model,
      placed,
      source.dataset.tokenizer,
      context=source.context,
      mesh=self._mesh,
      prefix=source.prefix,
      bos=source.bos,
    )

  def _ask(self, step: int, cell: Cell, task: Any, asked: Callable[[], Any]) -> None:
    began = time.perf_counter()
    self._say(f"task {task.name}")
    scores = _zero_shot().ask(asked(), [task])
    self._write(
      step,
      cell,
      self._task_settings(cell, task),
      {"scores": scores, "seconds": time.perf_counter() - began},
    )

  def close(self) -> None:
    if self._sink:
      self._sink.close()

  def _read(self, step: int, cell: Cell, settings: dict[str, Any]) -> Result | None:
    return self._folder.read(step, cell.row, cell.method, settings)

  def _write(self, step: int, cell: Cell, settings: dict[str, Any], found: dict[str, Any]) -> None:
    # JSON knows no NaN: it is null.
    found = jax.tree.map(
      lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, found
    )
    self._folder.write(
      step,
      cell.row,
      cell.method,
      settings,
      {
        "step": step,
        **cell._asdict(),
        **found,
        "settings": settings,
        "source": self.source.described,
        **workdir_lib.manifest({}),
      },
    )

  def _result(self, step: int, cell: Cell) -> Result | None:
    found = self._read(step, cell, self._settings(cell))
    tasks = [self._read(step, cell, self._task_settings(cell, task)) for task in self._tasks]
    return (
      None if found is None else results.joined(found, [task for task in tasks if task is not None])
    )

  def _unasked(self, step: int, cell: Cell) -> list[Any]:
    return [
      task
      for task in self._tasks
      if self._read(step, cell, self._task_settings(cell, task)) is None
    ]

  @functools.cached_property
  def calibration(self) -> list[dict[str, np.ndarray]]:
    """The same windows of training data for every run on these data, whatever its batches."""
    source = self.source
    # Several readers would deal their documents to rows as the batch has places.
    c = dataclasses.replace(source.data, readers=1)
    batches = data.train_batches(
      source.dataset, c, context=source.context, batch_size=source.batch_size, seed=SEED
    )
    names = ("tokens", "segment_ids", "positions") if c.mask_documents else ("tokens",)
    rows, taken = [], 0
    while taken < self._windows:
      rows.append(next(batches))
      taken += len(rows[-1]["tokens"])
    batches.close()
    whole = {
      name: np.concatenate([batch[name] for batch in rows])[: self._windows] for name in names
    }
    return [
      {name: x[start : start + source.batch_size] for name, x in whole.items()}
      for start in range(0, self._windows, source.batch_size)
    ]

  def _quantized(self, params: Any, cell: Cell) -> quant.QuantizedModel | None:
    if cell.method != "none":
      return quant.ptq.quantize(
        self.source.model,
        params,
        quant.RECIPES[cell.recipe],
        cell.method,
        self.calibration if cell.calibrated else (),
        say=self._say,
      )
    return (
      quant.quantized(self.source.model, params, self.source.trained_under)
      if self.source.trained_under
      else None
    )

  def _metrics(self, cell: Cell, params: Any, q: quant.QuantizedModel | None) -> dict[str, Any]:
    source, everywhere = self.source, mesh_lib.replicated(self._mesh)
    if cell not in self._steps:
      # The quantized model is the same of every checkpoint: only its parameters differ.
      step = (
        steps.make_pair_step(source.model, q.model, source.data.mask_documents)
        if q
        else steps.make_eval_step(source.model, source.data.mask_documents)
      )
      self._steps[cell] = jax.jit(step, out_shardings=everywhere)
    number = itertools.count(1)
    with mesh_lib.use(self._mesh):
      arguments = [
        jax.device_put(tree, everywhere) for tree in ([params, q.params] if q else [params])
      ]

      def of_batch(batch):
        self._say(f"batch {next(number)} of {len(self._batches)}")
        return jax.device_get(
          self._steps[cell](*arguments, mesh_lib.put_batch(batch, self._mesh, source.batch_size))
        )

      if q:
        return metrics.compare(of_batch, self._batches, self._num_bytes, seed=SEED)
      return metrics.evaluate(of_batch, self._batches, self._num_bytes)

  def _outliers(self, model: Any, params: Any, plain: Any) -> dict[str, float]:
    """By the names that training logs them under, of the model as it was trained: what degradation
    is to be seen beside."""
    self._say("outliers")
    if self._measure_outliers is None:
      self._measure_outliers = activations.on_documents(
        model, self._batches, self._mesh, self.source.data.mask_documents
      )
    with mesh_lib.use(self._mesh):
      found = self._measure_outliers(
        *jax.device_put((params, plain), mesh_lib.replicated(self._mesh))
      )
    return {f"outliers/{name}": value for name, value in found.items()}

  def _model_settings(self, cell: Cell) -> dict[str, Any]:
    """What the quantized model depends on, beside the step, the recipe and the method."""
    source = self.source
    return {
      "version": VERSION,
      "trained": source.trained,
      "tokenizer": source.dataset.tokenizer.fingerprint,
      "context": source.context,
      "seed": SEED,
      "calibration_windows": self._windows if cell.calibrated else 0,
      "calibration_data": source.dataset.fingerprint if cell.calibrated else None,
    }

  def _settings(self, cell: Cell) -> dict[str, Any]:
    """All that a cell's numbers depend on: other settings make another cell."""
    source = self.source
    return {
      **self._model_settings(cell),
      "data": source.dataset.fingerprint,
      "documents": source.documents,
      "mask_documents": source.data.mask_documents,
      "resamples": metrics.RESAMPLES,
      "confidence": metrics.CONFIDENCE,
    }

  def _task_settings(self, cell: Cell, task: Any) -> dict[str, Any]:
    return {
      **self._model_settings(cell),
      results.OF_TASKS: task.name,
      "content": task.content,
      "prefix": self.source.prefix,
      "bos": self.source.bos,
    }


def scalars(cell: Result) -> dict[str, float]:
  """The numbers of a cell by name, without intervals."""
  numbers = {**cell["metrics"], **results.task_scores(cell)}
  return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def table(cells: Sequence[dict[str, Any]]) -> str:
  """A line a cell. The difference of the loss is to the same parameters in full precision, with its
  interval; a run that was trained quantized has no others, which a line below says."""
  accuracies = list(
    dict.fromkeys(
      name for cell in cells for name in results.task_scores(cell) if "stderr" not in name
    )
  )
  rows = [
    (
      "step",
      "recipe",
      "method",
      "loss",
      "difference",
      f"{metrics.CONFIDENCE:.0%} interval",
      "bits per byte",
      "KL",
      "agreement",
      "MiB",
      *accuracies,
      "seconds",
    )
  ]
  for cell in cells:
    m, numbers = cell["metrics"], scalars(cell)
    low, high = m.get("loss_difference_interval", (None, None))
    rows.append(
      (
        str(cell["step"]),
        cell["recipe"],
        cell["method"],
        shown(m["loss"]),
        shown(m.get("loss_difference"), "+.4f"),
        "" if None in (low, high) else f"{low:+.4f} … {high:+.4f}",
        shown(m["bits_per_byte"]),
        shown(m.get("kl")),
        shown(m.get("agreement"), ".1%"),
        f"{cell['size_bytes'] / 2**20:.2f}",
        *(shown(numbers.get(name)) for name in accuracies),
        f"{sum(cell['seconds'].values()):.1f}",
      )
    )
  trained_quantized = any(cell["method"] == "none" and "kl" in cell["metrics"] for cell in cells)
  return "\n".join([*cli.aligned(rows), *([OWN_REFERENCE] if trained_quantized else [])])


def shown(value: float | None, style: str = ".4f") -> str:
  return "" if value is None else format(value, style)


def _zero_shot() -> Any:
  """Only where tasks are asked for: it needs the extra `eval`."""
  from beyond_outliers.evaluate import harness

  return harness


def _load(
  tasks: Sequence[str], folders: Sequence[str], dataset: data.Dataset, folder: Any
) -> list[Any]:
  """Those of the harness, of the folders, or made of held-out text below `folder`. Errors:
  ConfigError."""
  made = [folder / "tasks"] if set(tasks) & offline_tasks.HELD_OUT.keys() else []
  for path in made:
    offline_tasks.from_held_out(dataset, path)
  return _zero_shot().load(tasks, [*folders, *made])
