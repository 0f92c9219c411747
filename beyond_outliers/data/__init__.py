"""Text to batches: `prepare` or `open` a dataset, then `train_batches` and `validation_batches`."""

from beyond_outliers.data.pipeline import Batches, train_batches
from beyond_outliers.data.preparation import dataset_directory, prepare
from beyond_outliers.data.shards import Dataset, verify
from beyond_outliers.data.shards import open_dataset as open
from beyond_outliers.data.windows import ValidationBatches, validation_batches
from beyond_outliers.errors import DataError

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
