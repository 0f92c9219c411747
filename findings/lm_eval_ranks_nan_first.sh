#!/usr/bin/env bash
# lm-evaluation-harness ranks a choice whose log-likelihood is NaN first: a model that overflows
# scores like one that guesses.
#
# Multiple-choice questions are scored with numpy.argmax, which treats NaN as the largest. A model
# whose logits are all NaN "chooses" the first answer of every question: its accuracy is about 25 %
# with four choices and 50 % with two, with a standard error and without a warning. A model that
# gives NaN for one choice chooses that one. So a quantized model that overflows looks like one that
# has forgotten what it knew. Check in the model's adapter that log-likelihoods are finite.
#
# Versions: lm-eval 0.4.13, numpy 2.4.6, datasets 5.2.0. Seen; the first answer is right in 2 of 8:
#   finite: acc 1.0 · NaN in a wrong choice: acc 0.0 · all NaN: acc 0.25 ± 0.164
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet lm-eval==0.4.13 numpy==2.4.6 datasets==5.2.0
cd "$folder"
bin/python -I - <<'PY'
import json
import math
import pathlib
import sys

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

RIGHT = [0, 1, 2, 3, 0, 1, 2, 3]
rows = [{"context": "Which?", "choices": list("abcd"), "answer": answer} for answer in RIGHT]
pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
TASK = {
  "task": "four_choices",
  "dataset_path": "json",
  "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}, "cache_dir": "cache"},
  "test_split": "test",
  "output_type": "multiple_choice",
  "doc_to_text": "{{context}} ",
  "doc_to_choice": "choices",
  "doc_to_target": "answer",
  "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


class Knowing(LM):
  """Knows every answer, but for choices whose log-likelihood is NaN."""

  def __init__(self, is_nan):
    super().__init__()
    self.is_nan = is_nan

  def loglikelihood(self, requests):
    found = []
    for request in requests:
      wrong = abs(request.idx - request.doc["answer"])
      found.append((math.nan if self.is_nan(wrong) else -float(wrong), False))
    return found

  def generate_until(self, requests):
    raise NotImplementedError

  loglikelihood_rolling = generate_until


def accuracy(is_nan):
  found = lm_eval.simple_evaluate(
    Knowing(is_nan),
    tasks=[TASK],
    task_manager=TaskManager(include_defaults=False),
    torch_random_seed=None,
  )
  return found["results"]["four_choices"]


finite = accuracy(lambda wrong: False)
one = accuracy(lambda wrong: wrong == 1)
every = accuracy(lambda wrong: True)
print(
  f"finite: acc {finite['acc,none']} · NaN in a wrong choice: acc {one['acc,none']} · "
  f"all NaN: acc {every['acc,none']} ± {every['acc_stderr,none']:.3f}"
)
if (one["acc,none"], every["acc,none"]) != (0.0, 0.25):
  sys.exit("changed: NaN is not ranked first")
assert finite["acc,none"] == 1.0
PY
