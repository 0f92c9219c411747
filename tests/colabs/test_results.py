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


def test_the_table_at_twenty_tokens_a_parameter_is_of_the_packed_runs():
  runs = packed_runs.find_runs(ROOT / "colabs" / "results" / "ladder.tar.xz")
  quest = {
    (run.config.optimizer.name, run.config.optimizer.learning_rate): run
    for run in runs
    if run.config.quant.recipe == "quest_w4a4" and run.config.seed == 0
  }
  frame = predictors.frame([run for run in runs if run.config.quant.recipe == "none"])
  frame = frame[frame.recipe == "rtn_w4a4"]
  of = frame[frame.seed == 0].set_index(["optimizer", "method"])
  text = (ROOT / "colabs" / "README.md").read_text()
  section = text[text.index("## Does that hold at twenty tokens") :].split("\n## ")[0]
  rows = re.findall(r"^\| (\w+) \| (\d+\.\d{4} \| .*) \|$", section, re.MULTILINE)
  assert len(rows) == 6
  for name, numbers in rows:
    one = of.loc[name, "rtn"]
    trained = quest[name, one.learning_rate].metrics()["eval/loss"].dropna().iloc[-1]
    found = [one.full_precision_loss, trained - one.full_precision_loss]
    for method in METHODS:
      found += [of.loss_difference[name, method], of.R_L[name, method]]
    said = [float(number) for number in re.findall(NUMBER, numbers)]
    assert said[:8] == pytest.approx(found, abs=6e-5), name
    assert said[8:] == pytest.approx(
      [one["max_to_median/linear"], one["kurtosis/linear"]], abs=6e-3
    )
  coefficients = re.findall(
    rf"^\| (\w+) \| (\w+) \| {NUMBER} .* \| {NUMBER} \(.* \|$", section, re.MULTILINE
  )
  columns = {"R_L": "R_L", "MMR": "max_to_median/linear", "kurtosis": "kurtosis/linear"}
  assert len(coefficients) == len(METHODS) * len(columns)
  for method, name, *said in coefficients:
    pair = of.xs(method, level="method")[["loss_difference", columns[name]]]
    found = [pair.corr(kind).iloc[0, 1] for kind in ("pearson", "spearman")]
    assert [float(value) for value in said] == pytest.approx(found, abs=6e-3), (method, name)
