"""Files of a task of the lm-evaluation-harness: a YAML file, and examples as JSON lines."""

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

# Field by which a kind is recognized -> (the harness's fields of such tasks, {metric: how the
# harness aggregates it}). The harness puts a space before a choice or an ending, but not before the
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
  # One of `contexts`, `answer` being its number; then the `ending`. The harness takes the number
  # from doc_to_text.
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
  """Writes name.yaml and name.jsonl; the kind follows from the examples' fields.

  split: test or validation, as in the source. metrics: by default all of the kind.
  Errors: ConfigError for a folder that cannot be written."""
  folder = pathlib.Path(folder).absolute()
  examples = list(examples)
  kind, aggregations = next(TASK_KINDS[field] for field in TASK_KINDS if field in examples[0])
  listed = [
    {"metric": metric, "aggregation": aggregation, "higher_is_better": metric != "perplexity"}
    for metric, aggregation in aggregations.items()
    if metric in (metrics or aggregations)
  ]
  # The datasets library resolves paths against the current directory, and caches what it has read:
  # hence absolute paths, and a cache next to the files.
  task = {
    "task": name,
    "dataset_path": "json",
    f"{split}_split": split,
    "dataset_kwargs": {
      "data_files": {split: glob.escape(str(folder / f"{name}.jsonl"))},  # it is read as a pattern
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
  """Writes a file atomically, unless it has that text: caches go by the file's date."""
  if not path.exists() or path.read_text() != text:
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(path)
