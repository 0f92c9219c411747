"""Plan of an evaluation job: its cells, and the settings that each cell's results depend on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from beyond_outliers import quant
from beyond_outliers.config.checks import nearest, require
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import metrics, results
from beyond_outliers.evaluate.target import Target
from beyond_outliers.mesh import jax_settings
from beyond_outliers.model import transformer
from beyond_outliers.types import Json

if TYPE_CHECKING:  # needs the extra `eval`
  from beyond_outliers.evaluate.harness import LoadedTask

# Of the measurements: raised with every change that alters their numbers; all is then remeasured.
VERSION = 2
PROPAGATION = "propagation"  # stored as a result of its own, as a task's is
WINDOWS = 8  # of validation text, on which error is decomposed
SEED = 0  # of the calibration windows and of the bootstrap: the same for every run


class Cell(NamedTuple):
  """One way to evaluate a checkpoint. method "none": as it was trained, under its own recipe."""

  # Row of quant.RECIPES; for a model trained under rules of its own, followed by these.
  recipe: str
  method: str

  @property
  def calibrated(self) -> bool:
    """Whether the method needs training data."""
    return self.method != "none" and quant.ptq.method_named(self.method).calibrated

  @property
  def row(self) -> str:
    """The recipe without a run's own rules, which the run's identity covers."""
    return self.recipe.partition(",")[0]


def check_names(recipes: Sequence[str], methods: Sequence[str]) -> None:
  """Refuses unknown recipes and methods. Errors: ConfigError."""
  known = [name for name in quant.RECIPES if name != "none"]
  for name in recipes:
    remedy = "the model as it was trained is evaluated anyway; leave it out"
    require(name != "none", "--recipes", name, remedy)
    require(name in known, "--recipes", name, f"unknown recipe; {nearest(name, known, cutoff=0.5)}")
  for name in methods:
    quant.ptq.method_named(name, "--methods")


def plan_cells(target: Target, recipes: Sequence[str], methods: Sequence[str]) -> list[Cell]:
  """The model as it is, then every method under every recipe.

  Errors, before any checkpoint is read: ConfigError for unknown names, recipes that don't fit the
  model or a method, and any recipe for a model that was trained quantized."""
  check_names(recipes, methods)
  require(
    not recipes or target.trained_under is None,
    "--recipes",
    ",".join(recipes),
    "methods start from a model in full precision, but this one was trained under "
    f"{target.recipe!r}; leave --recipes and --methods out to evaluate it as it was trained, or "
    "give the run of its full-precision twin (quant.recipe = 'none')",
  )
  shapes = transformer.shapes(target.model)
  pairs = itertools.product(dict.fromkeys(recipes), dict.fromkeys(methods))
  cells = [Cell(recipe, method) for recipe, method in pairs]
  for recipe, method in cells:
    try:
      quant.ptq.check_quantizable(target.model, shapes, quant.RECIPES[recipe], method)
    except ConfigError as error:
      raise ConfigError(f"--recipes = {recipe!r} with --methods = {method!r}: {error}") from None
  return [Cell(target.recipe, "none"), *cells]


# ---- settings: a result under other settings goes to another file


def cell_settings(target: Target, cell: Cell, calibration_windows: int) -> Json:
  """Settings that a cell's metrics depend on."""
  return {
    **_model_settings(target, cell, calibration_windows),
    **_text_settings(target),
    "resamples": metrics.RESAMPLES,
    "confidence": metrics.CONFIDENCE,
  }


def task_settings(target: Target, cell: Cell, calibration_windows: int, task: LoadedTask) -> Json:
  """Settings that a task's scores depend on."""
  return {
    **_model_settings(target, cell, calibration_windows),
    results.TASK: task.name,
    "content": task.content,
    "prefix": target.text.prefix,
    "bos": target.text.bos,
  }


def propagation_settings(target: Target, cell: Cell, calibration_windows: int) -> Json:
  """Settings that the decomposition of a cell's error depends on."""
  return {
    **_model_settings(target, cell, calibration_windows),
    **_text_settings(target),
    results.TASK: PROPAGATION,
    "windows": WINDOWS,
  }


def _text_settings(target: Target) -> Json:
  """Settings that say which validation text is read, and how."""
  text = target.text
  return {
    "data": text.dataset.fingerprint,
    "documents": text.documents,
    "mask_documents": text.section.mask_documents,
  }


def _model_settings(target: Target, cell: Cell, calibration_windows: int) -> Json:
  """Settings that the quantized model depends on, apart from step, recipe and method."""
  text = target.text
  return {
    "version": VERSION,
    "trained": target.identity,
    **({"average": target.average.name} if target.average else {}),
    "tokenizer": text.dataset.tokenizer.fingerprint,
    "context": text.context,
    "seed": SEED,
    "calibration_windows": calibration_windows if cell.calibrated else 0,
    "calibration_data": text.dataset.fingerprint if cell.calibrated else None,
    **jax_settings.changed(),  # such as the precision of matrix products
  }
