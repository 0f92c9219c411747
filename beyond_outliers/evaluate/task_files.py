"""Files of a task of the lm-evaluation-harness: its YAML file, and its examples in JSON lines."""

from __future__ import annotations

import glob
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from beyond_outliers.config.files import make_folder
from beyond_outliers.errors import ConfigError
from beyond_outliers.types import Json, PathLike

Example = Json

# The field that tells a kind -> the harness's fields of its tasks, and metric -> how the harness
# takes it over all examples. It puts the space before a choice or an ending, and none before the
# target of a log-likelihood.
TASK_KINDS = {
  # `context`, then one of `choices`; `answer` is its number.
  "choices": (
    {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"},
    {"acc": "mean", "acc_norm": "mean"},
  ),
  # `context`, then the `word`.
  "word": (
    {"output_type": "loglikelihood", "doc_to_target": " {{word}}"},
    {"acc": "mean", "perplexity": "perplexity"},
  ),
  # One of `contexts`, `answer` is its number; then the `ending`. The harness reads the number from
  # the text.
  "contexts": (
    {
      "output_type": "multiple_choice",
      "doc_to_text": "answer",
      "doc_to_choice": "contexts",
      "doc_to_target": "ending",
    },
    {"acc": "mean"},
  ),
}


def write_task(
  folder: PathLike,
  name: str,
  examples: Iterable[Example],
  *,
  split: str = "test",
  metrics: Sequence[str] = (),
) -> None:
  """Writes name.yaml and name.jsonl, of the kind that the fields of the examples say.

  split: test or validation, as the source calls it. metrics: by default all of the kind.
  Errors: ConfigError for a folder that cannot be written."""
  folder = pathlib.Path(folder).absolute()
  examples = list(examples)
  kind, aggregations = next(TASK_KINDS[field] for field in TASK_KINDS if field in examples[0])
  listed = [
    {"metric": metric, "aggregation": aggregation, "higher_is_better": metric != "perplexity"}
    for metric, aggregation in aggregations.items()
    if metric in (metrics or aggregations)
  ]
  # The harness's library of datasets resolves names against where it is started, and keeps a copy
  # of what it has read.
  task = {
    "task": name,
    "dataset_path": "json",
    f"{split}_split": split,
    "dataset_kwargs": {
      "data_files": {split: glob.escape(str(folder / f"{name}.jsonl"))},  # taken for a pattern
      "cache_dir": str(folder / "cache"),
    },
    "doc_to_text": "{{context}}",
    **kind,
    "metric_list": listed,
  }
  make_folder(folder, ConfigError, "give another folder for tasks")
  write_if_changed(
    folder / f"{name}.jsonl",
    "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples),
  )
  write_yaml(folder / f"{name}.yaml", task)


def write_yaml(path: pathlib.Path, fields: Json) -> None:
  write_if_changed(path, "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()))


def write_if_changed(path: pathlib.Path, text: str) -> None:
  """Writes a file whole, unless it is so already: the harness caches by the source's date."""
  if not path.exists() or path.read_text() != text:
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(path)
