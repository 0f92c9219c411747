"""Training in place: of a TFDS dataset, only the validation documents are copied."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from beyond_outliers import config
from beyond_outliers.data import splits, tfds
from beyond_outliers.data.document import Document
from beyond_outliers.types import Json


class InPlace:
  """Documents of a TFDS dataset by split, reading as little as the split's rule allows."""

  def __init__(self, cfg: config.Data):
    self._cfg = cfg
    self._rule, argument = splits.validation_rule(cfg)
    self._held_out = float(argument) if self._rule == "fraction" else 0.0
    self._records = tfds.Records(cfg.path, cfg.field)
    newest = int(argument) if self._rule == "newest" else 0
    # Records to train on; under "fraction" the held-out ones among them are skipped.
    self._count = max(0, len(self._records) - newest)

  def validation(self) -> splits.LabeledDocuments:
    """The validation documents; only the rule "fraction" reads every document to find them."""
    if self._rule == "newest":
      newest = self._records.read(range(self._count, len(self._records)))
      return (("validation", document) for document in newest)
    labeled = splits.split_documents(self._cfg)
    if self._rule == "path":  # validation documents come first
      return itertools.takewhile(lambda item: item[0] == "validation", labeled)
    return (item for item in labeled if item[0] == "validation")

  def training_sample(self, max_bytes: int) -> Iterator[Document]:
    """As `splits.training_sample`, without reading the records in between."""
    stride = splits.sample_stride(self._cfg, max_bytes)
    for document in self._records.read(range(0, self._count, stride)):
      if not splits.is_held_out(document.content, self._held_out):
        yield document

  def training(self) -> tuple[Json, Json]:
    """Counts of the training split and the description of its records, for meta.json. Counts that
    would take reading are None. Errors: DataError if there is no document to train on."""
    if not self._count:
      raise splits.empty_split(self._cfg, "train")
    counts = {
      "documents": None if self._held_out else self._count,
      "tokens": None,
      "bytes": None,
      "shards": None,
    }
    return counts, {
      "path": os.path.abspath(self._cfg.path),
      "field": self._cfg.field,
      "count": self._count,
      "held_out": self._held_out,
    }
