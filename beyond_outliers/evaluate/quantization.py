"""Quantization of checkpoints under evaluation, and the training windows for its calibration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from beyond_outliers import data, quant
from beyond_outliers.config.checks import require
from beyond_outliers.data.windows import num_windows
from beyond_outliers.evaluate.plan import SEED, Cell
from beyond_outliers.evaluate.target import Target
from beyond_outliers.evaluate.text import Text
from beyond_outliers.types import Params


class CheckpointQuantizer:
  """Quantizes checkpoints of one target by a cell's method and recipe.

  windows: how many of training data, for methods that need some. say: receives progress."""

  def __init__(self, target: Target, windows: int, say: Callable[[str], None]):
    self._target, self._windows, self._say = target, windows, say

  def __call__(self, params: Params, cell: Cell) -> quant.QuantizedModel | None:
    """The quantized model; None where the cell leaves a full-precision model as it is."""
    target = self._target
    if cell.method != "none":
      return quant.ptq.quantize(
        target.model,
        params,
        quant.RECIPES[cell.recipe],
        cell.method,
        self._calibration if cell.calibrated else (),
        say=self._say,
      )
    if target.trained_under:
      return quant.quantized(target.model, params, target.trained_under)
    return None

  @functools.cached_property
  def _calibration(self) -> list[dict[str, np.ndarray]]:
    return calibration_batches(self._target.text, self._windows)


def check_calibration(text: Text, windows: int) -> None:
  """Refuses more windows than the training data have, which would repeat some. Not checked where
  the number of training tokens is unknown. Errors: ConfigError."""
  tokens = text.dataset.meta["splits"]["train"]["tokens"]
  known = windows if tokens is None else num_windows(tokens, text.context)
  remedy = f"the training data have {known} windows of {text.context} tokens; give at most that"
  require(windows <= known, "--calibration", windows, remedy)


def calibration_batches(text: Text, windows: int) -> list[dict[str, np.ndarray]]:
  """The same windows of training data for every run on these data, whatever its batch size."""
  # With several readers, the windows would depend on the batch size.
  section = dataclasses.replace(text.section, readers=1)
  batches = data.train_batches(
    text.dataset, section, context=text.context, batch_size=text.batch_size, seed=SEED
  )
  names = ("tokens", "segment_ids", "positions") if section.mask_documents else ("tokens",)
  taken = [next(batches) for _ in range(-(-windows // text.batch_size))]
  batches.close()
  whole = {name: np.concatenate([batch[name] for batch in taken])[:windows] for name in names}
  return [
    {name: x[start : start + text.batch_size] for name, x in whole.items()}
    for start in range(0, windows, text.batch_size)
  ]
