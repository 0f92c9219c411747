"""Text to batches: `prepare` or `open` a dataset, then `train_batches` and `validation_batches`."""

from typing import TYPE_CHECKING, Any

from beyond_outliers.data.preparation import dataset_directory, prepare
from beyond_outliers.data.shards import Dataset, verify
from beyond_outliers.data.shards import open_dataset as open
from beyond_outliers.data.windows import ValidationBatches, validation_batches
from beyond_outliers.errors import DataError

if TYPE_CHECKING:
  from beyond_outliers.data.pipeline import Batches, train_batches

__all__ = [
  "Batches",
  "DataError",
  "Dataset",
  "ValidationBatches",
  "dataset_directory",
  "open",
  "prepare",
  "train_batches",
  "validation_batches",
  "verify",
]


def __getattr__(name: str) -> Any:
  """Imports the pipeline on first use: only training needs Grain, which takes half a second."""
  if name in ("Batches", "train_batches"):
    from beyond_outliers.data import pipeline

    return getattr(pipeline, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
