"""Tasks made from text: right answers follow their context, wrong ones are from elsewhere, and
making them twice gives the same files."""

import glob
import json
import random
import shutil
import zipfile

import pytest

from beyond_outliers import config, data
from beyond_outliers.data import sums
from beyond_outliers.errors import ConfigError, DataError
from beyond_outliers.evaluate import offline_tasks
from configs import adamw


@pytest.fixture(scope="module")
def documents(words):
  """Eight of 60 sentences, each of which names its document and its place, and says so once
  only."""
  draw = random.Random(0)

  def sentence(document, place):
    return (
      f"In {document}.{place} "
      + " ".join(draw.choices(words, k=draw.randint(4, 40)))
      + draw.choice([".", "!", ".”", "?"])
    )

  return [
    "\n\n".join(
      " ".join(sentence(document, place) for place in range(start, start + 5))
      for start in range(0, 60, 5)
    )
    for document in range(8)
  ]


def test_the_true_continuation_is_the_only_one_from_the_document(documents):
  examples = list(offline_tasks.continuation(documents))
  assert len(examples) > 50
  for example in examples:
    home = next(text for text in documents if example["context"] in text)
    true = example["choices"][example["answer"]]
    assert home.split(example["context"])[1].lstrip().startswith(true)
    assert len(set(example["choices"])) == offline_tasks.CHOICES
    assert [choice in home for choice in example["choices"]] == [
      choice == true for choice in example["choices"]
    ]
    assert all(len(choice.split()) in offline_tasks.CHOICE_WORDS for choice in example["choices"])
  # No answer can be told by its place alone.
  counts = [
    sum(example["answer"] == place for example in examples)
    for place in range(offline_tasks.CHOICES)
  ]
  assert max(counts) < 0.4 * len(examples)


def test_the_last_word_ends_its_passage(documents, words):
  examples = list(offline_tasks.last_word(documents))
  assert len(examples) > 50
  for example in examples:
    home = next(text for text in documents if example["context"] in text)
    after = home.split(example["context"])[1]
    assert after.startswith(" " + example["word"]) and after[len(example["word"]) + 1] in ".!?"
    assert (
      len(example["context"].split()) >= offline_tasks.PASSAGE_WORDS - 1
      and example["word"] in words
    )


@pytest.fixture(scope="module")
def dataset(documents, tmp_path_factory):
  """The documents as the validation split of a prepared dataset."""
  folder = tmp_path_factory.mktemp("text")
  for number, text in enumerate(["Some text to train on.", *documents]):
    (folder / f"{number}.txt").write_text(text)
  settings = (
    f"nano,data.source=text,data.path={folder}/*.txt,data.tokenizer=bytes,data.vocab=258,"
    f"data.validation=newest:8,data.directory={folder}"
  )
  return data.prepare(config.resolve(adamw.get_config(settings)).data, log=lambda text: None)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_text_becomes_the_same_files_again(dataset, documents, tmp_path, monkeypatch):
  offline_tasks.from_held_out(dataset, tmp_path / "a")
  assert read(tmp_path / "a" / "continuation.jsonl") == list(offline_tasks.continuation(documents))
  assert read(tmp_path / "a" / "last_word.jsonl") == list(offline_tasks.last_word(documents))
  assert {path.name for path in (tmp_path / "a").iterdir()} == {
    f"{name}.{kind}" for name in offline_tasks.HELD_OUT for kind in ("yaml", "jsonl")
  }
  dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
  offline_tasks.from_held_out(dataset, tmp_path / "a")
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == dates
  monkeypatch.setattr(offline_tasks, "EXAMPLES", 20)
  offline_tasks.from_held_out(dataset, tmp_path / "a")
  fewer = read(tmp_path / "a" / "last_word.jsonl")
  assert 10 < len(fewer) <= 20 and fewer[-1] in list(offline_tasks.last_word(documents))[-20:]


@pytest.mark.parametrize("name", ["plain", "lr=[1e-3]", "[ab]", "*"])
def test_a_task_reads_the_examples_of_its_own_folder(tmp_path, name):
  """The harness takes their path for a pattern."""
  for folder in ("a", name):
    offline_tasks.write_task(tmp_path / folder, "word", [{"context": "x", "word": folder}])
  lines = (tmp_path / name / "word.yaml").read_text().splitlines()
  kwargs = dict(line.split(": ", 1) for line in lines)["dataset_kwargs"]
  (found,) = glob.glob(json.loads(kwargs)["data_files"]["test"])
  with open(found) as file:
    assert json.loads(file.read())["word"] == name


def test_damaged_documents_make_no_task(dataset, tmp_path, monkeypatch):
  shutil.copytree(dataset.directory, tmp_path / "data")
  path = tmp_path / "data" / "validation-00000.bin"
  path.write_bytes(path.read_bytes()[:-6] + b"x\0" + path.read_bytes()[-4:])
  monkeypatch.setattr(sums, "AT_OPENING", 0)
  with pytest.raises(DataError, match=r"validation-00000.bin: contents are not those that were"):
    offline_tasks.from_held_out(data.open(str(tmp_path / "data")), tmp_path / "tasks")
  assert not (tmp_path / "tasks").exists()


def test_a_folder_that_tasks_cannot_go_into_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"file: File exists; give another folder for tasks"):
    offline_tasks.write_task(tmp_path / "file", "word", [{"context": "x", "word": "y"}])


def test_documents_without_a_passage_are_refused(dataset, tmp_path, monkeypatch):
  monkeypatch.setattr(offline_tasks, "PASSAGE_WORDS", 100_000)
  with pytest.raises(ConfigError, match=r"tasks = continuation: .* = 8: they hold no example"):
    offline_tasks.from_held_out(dataset, tmp_path)


QUARTZ = (
  "A small nation shut down several factories. Would the river have\n\n"
  " A: more waste\n B: less waste?"
)
LOGIQA = (
  "\nPassage: All men are mortal.Question: Which follows?\n"
  "A. A.Socrates is a man.\nB. B.None.\nC. C.Men die.\nD. D.Gods do.\nAnswer:"
)


def wheel(path, **contents):
  with zipfile.ZipFile(path, "w") as archive:
    for name, (text, answer) in contents.items():
      line = {
        "input": [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}],
        "ideal": answer,
      }
      archive.writestr(offline_tasks.EVALS_FILES[name][0], json.dumps(line) + "\n")
  return path


def test_questions_of_evals(tmp_path):
  offline_tasks.from_evals(
    wheel(tmp_path / "a.whl", quartz_evals=(QUARTZ, "B"), logiqa_evals=(LOGIQA, "C")), tmp_path
  )
  assert read(tmp_path / "quartz_evals.jsonl") == [
    {
      "context": "A small nation shut down several factories. Would the river have",
      "choices": ["more waste", "less waste"],
      "answer": 1,
    }
  ]
  assert read(tmp_path / "logiqa_evals.jsonl") == [
    {
      "context": "Passage: All men are mortal.\nQuestion: Which follows?\nChoices:\n"
      "A. Socrates is a man.\nB. None.\nC. Men die.\nD. Gods do.\nAnswer:",
      "choices": ["Socrates is a man.", "None.", "Men die.", "Gods do."],
      "answer": 2,
    }
  ]


def test_a_folder_that_a_wheel_was_unzipped_into_gives_the_same(tmp_path):
  whole = wheel(tmp_path / "a.whl", quartz_evals=(QUARTZ, "B"), logiqa_evals=(LOGIQA, "C"))
  zipfile.ZipFile(whole).extractall(tmp_path / "unzipped")
  offline_tasks.from_evals(whole, tmp_path / "a")
  offline_tasks.from_evals(tmp_path / "unzipped", tmp_path / "b")
  for name in offline_tasks.EVALS_FILES:
    assert read(tmp_path / "a" / f"{name}.jsonl") == read(tmp_path / "b" / f"{name}.jsonl")


@pytest.mark.parametrize("name", ["../outside", "/outside", "evals/../../outside"])
def test_names_outside_of_a_wheels_folder_are_refused(name, tmp_path):
  path = wheel(tmp_path / "a.whl", quartz_evals=(QUARTZ, "B"), logiqa_evals=(LOGIQA, "C"))
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr(name, "text")
  with pytest.raises(
    ConfigError, match=r"--evals: names in .* = \['.*outside'\]: point out of its folder"
  ):
    offline_tasks.from_evals(path, tmp_path / "tasks")
  assert not (tmp_path / "tasks").exists()


def test_damaged_wheels_are_refused_and_nothing_is_written(tmp_path):
  whole = wheel(tmp_path / "a.whl", quartz_evals=(QUARTZ, "B"), logiqa_evals=(LOGIQA, "C"))
  content = whole.read_bytes()
  lines = wheel(tmp_path / "b.whl", quartz_evals=(QUARTZ, "B"), logiqa_evals=(LOGIQA, "E"))
  for damaged, told in (
    (content[:-30], "is not a wheel"),
    (b"<html>not found</html>", "is not a wheel"),
    (content.replace(b"mortal", b"mortar"), "logiqa.jsonl is damaged .*CRC"),
    (lines.read_bytes(), "line 1 of evals/registry/data/logiqa/logiqa.jsonl: ValueError"),
  ):
    (tmp_path / "c.whl").write_bytes(damaged)
    with pytest.raises(ConfigError, match=rf"^--evals\b.*{told}.*evals==3.0.1.post1$"):
      offline_tasks.from_evals(tmp_path / "c.whl", tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_another_wheel_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="there is no such file"):
    offline_tasks.from_evals(tmp_path / "none.whl", tmp_path)
  with pytest.raises(ConfigError, match="the wheel holds no evals/registry/data/logiqa"):
    offline_tasks.from_evals(wheel(tmp_path / "b.whl", quartz_evals=(QUARTZ, "A")), tmp_path)
  with pytest.raises(ConfigError, match="not of the form"):
    offline_tasks.from_evals(wheel(tmp_path / "c.whl", quartz_evals=("What?", "A")), tmp_path)
