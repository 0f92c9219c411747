"""Results that are kept in a clone: what the guide says of them is what they hold."""

import pathlib
import re

import pytest

from beyond_outliers.analysis import packed_runs, predictors

ROOT = pathlib.Path(__file__).parents[2]
NUMBER = r"([+-]?\d+\.\d+)"
METHODS = ("rtn", "gptq", "hadamard")


def test_the_table_of_quantization_after_training_is_of_the_packed_runs():
  runs = packed_runs.find_runs(ROOT / "colabs" / "results" / "nano.tar.xz")
  assert len(runs) == 24 and {run.status["status"] for run in runs} == {"done"}
  frame = predictors.frame([run for run in runs if run.config.quant.recipe == "none"])
  by_method = frame.set_index(["optimizer", "method", "seed"]).groupby(level=[0, 1])
  mean, error = by_method.mean(numeric_only=True), by_method.sem(numeric_only=True)
  text = (ROOT / "colabs" / "README.md").read_text()
  section = text[text.index("## Do outliers predict") :]
  rows = re.findall(rf"^\| (\w+) \| {NUMBER} ± {NUMBER} \| (.*) \|$", section, re.MULTILINE)
  assert [row[0] for row in rows] == ["psgd", "soap", "muon", "shampoo", "scion", "adamw"]
  for name, loss, loss_error, others in rows:
    said = [float(loss), float(loss_error), *map(float, re.findall(NUMBER, others))]
    one = (name, "rtn")
    found = [mean.full_precision_loss[one], error.full_precision_loss[one]]
    for of_method in ((name, method) for method in METHODS):
      found += [mean.loss_difference[of_method], error.loss_difference[of_method]]
      found.append(mean.R_L[of_method])
    assert said[:11] == pytest.approx(found, abs=6e-5)
    outliers = [mean["max_to_median/linear"][one], mean["kurtosis/linear"][one]]
    assert said[11:] == pytest.approx(outliers, abs=6e-3)
