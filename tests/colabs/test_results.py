"""Results that are kept in a clone: what the guide says of them is what they hold."""

import pathlib
import re
import runpy

import markdown
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.analysis import (
  along_training,
  landings,
  law_points,
  packed_runs,
  predictors,
  ptq_degradation,
  qat_gap,
  scaling_law,
)
from beyond_outliers.analysis.statistics import estimate
from beyond_outliers.analysis.tuning import final_metric

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
  section = text[text.index("## Do outliers predict") :].split("\n## ")[0]
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


def numbers(text):
  return [float(number) for number in re.findall(NUMBER, text)]


def said_of(values):
  """A mean, and from two seeds on its standard error: what a table shows of them."""
  mean, error = estimate(values)
  return [mean, error] if len(values) > 1 else [mean]


@pytest.fixture(scope="module")
def ladder():
  """(runs at twenty tokens a parameter, the guide's table and correlations of them)."""
  runs = packed_runs.find_runs(ROOT / "colabs" / "results" / "ladder.tar.xz" / "0.3m")
  assert {run.status["status"] for run in runs} == {"done"}
  section = markdown.read("colabs/README.md").split("## Does that hold at twenty tokens")[1]
  return runs, *[table.rows for table in markdown.tables(section.split("\n## ")[0])]


@pytest.fixture(scope="module")
def at_tuned_rates(ladder):
  runs = [run for run in ladder[0] if run.config.quant.recipe == "none"]
  frame = predictors.frame([run for run in runs if list(run.path.glob("eval/*"))])
  return frame[frame.recipe == "rtn_w4a4"]


def test_the_table_at_twenty_tokens_a_parameter_is_of_the_packed_runs(ladder, at_tuned_rates):
  gaps = {gap.optimizer: gap for gap in qat_gap.qat_gaps(ladder[0])[0]}
  assert {row[0] for row in ladder[1]} == set(gaps) and len(gaps) == 6
  for name, loss, trained, *of_methods, max_to_median, kurtosis in ladder[1]:
    of = at_tuned_rates[at_tuned_rates.optimizer == name].set_index("method").sort_values("seed")
    one, gap = of.loc[["rtn"]], gaps[name]
    assert set(one.learning_rate) == {gap.rates[0]} == {gap.rates[1]}, "one rate on both sides"
    found = [*estimate(one.full_precision_loss), *gap.loss]
    for method in METHODS:
      found += [*estimate(of.loss_difference[[method]]), of.R_L[[method]].mean()]
    found.append(of.R_L_centred[["hadamard"]].mean())
    said = numbers(" ".join([loss, trained, *of_methods]))
    assert said == pytest.approx(found, abs=6e-5), name
    outliers = [one["max_to_median/linear"].mean(), one["kurtosis/linear"].mean()]
    assert numbers(f"{max_to_median} {kurtosis}") == pytest.approx(outliers, abs=6e-3)


def test_correlations_at_twenty_tokens_a_parameter_are_of_the_packed_runs(ladder, at_tuned_rates):
  columns = {"R_L": "R_L", "R_L centred": "R_L_centred"}
  columns |= {"MMR": "max_to_median/linear", "kurtosis": "kurtosis/linear"}
  means = at_tuned_rates.groupby(["method", "optimizer"]).mean(numeric_only=True)
  assert len(ladder[2]) == len(METHODS) * len(columns)
  for method, name, pearson, _, spearman, *_ in ladder[2]:
    pair = means.loc[method][["loss_difference", columns[name]]]
    found = [pair.corr(kind).iloc[0, 1] for kind in ("pearson", "spearman")]
    said = [numbers(pearson)[0], numbers(spearman)[0]]
    assert said == pytest.approx(found, abs=6e-3), (method, name)


def test_the_tuned_rates_at_twenty_tokens_a_parameter_are_of_the_packed_runs(ladder):
  losses = {
    (
      *(run.config.optimizer.name, run.config.quant.recipe),
      *(run.config.optimizer.learning_rate, run.config.seed),
    ): final_metric(run, "eval/loss")
    for run in ladder[0]
  }
  (table,) = [
    table
    for table in markdown.tables(markdown.read("colabs/README.md"))
    if table.header[:3] == ["optimizer", "", "0.001"]
  ]
  said = {
    (name, {"full precision": "none"}.get(arm, arm.strip("`")), float(rate)): numbers(cell)[0]
    for name, arm, *cells in table.rows
    for rate, cell in zip(table.header[2:], cells, strict=True)
    if cell
  }
  found = {key[:-1]: loss for key, loss in losses.items() if key[-1] == 0}
  assert said == pytest.approx(found, abs=6e-5)
  for name in {name for name, *_ in found}:
    full_precision = {
      rate: loss for (n, arm, rate), loss in found.items() if (n, arm) == (name, "none")
    }
    configured = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["LEARNING_RATE"]["0.3m"]
    assert configured == min(full_precision, key=full_precision.get), name
  pays = re.search(rf"AdamW pays {NUMBER} and\s{NUMBER} nats", table.section)
  adamw = [
    losses["adamw", "quest_w4a4", 0.1, seed] - losses["adamw", "none", 0.1, seed] for seed in (0, 1)
  ]
  assert pays and numbers(pays[0]) == pytest.approx(adamw, abs=6e-5)


def test_what_four_bits_cost_at_rates_of_their_own_is_of_the_packed_runs(ladder):
  at_one, _ = qat_gap.qat_gaps(ladder[0])
  gaps = qat_gap.gaps_at_own_rates(ladder[0], at_one)
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "rate in full precision", "under `quest_w4a4`"),
    *("full precision, nats", "loss under it", "gap"),
  )
  assert [row[0] for row in rows] == [gap.optimizer for gap in gaps] and len(rows) == 6
  for gap, (_, *rates, full, under, cost) in zip(gaps, rows, strict=True):
    assert tuple(map(float, rates)) == gap.rates and len(gap.seeds) == 3
    found = [*estimate(gap.losses[0]), *estimate(gap.losses[1]), *gap.loss]
    assert numbers(" ".join([full, under, cost])) == pytest.approx(found, abs=6e-5)
  guide = markdown.read("colabs/README.md")
  (question,) = re.findall(r"^\| 2\. .*$", guide, re.MULTILINE)
  section = guide.split("## Which learning rates are best there")[1].split("\n## ")[0]
  under = {gap.optimizer: gap.losses[1] for gap in at_one}
  for gap in gaps:
    saved = stats.ttest_1samp(under[gap.optimizer] - gap.losses[1], 0)
    name = {"adamw": "AdamW", "scion": "Scion", "soap": "SOAP"}.get(gap.optimizer)
    if name is None:
      assert abs(under[gap.optimizer] - gap.losses[1]).max() < 5e-3
      continue
    mean = np.mean(under[gap.optimizer] - gap.losses[1])
    expected = [mean, *saved.confidence_interval()]
    for text in (question, section.replace("\n", " ")):
      said = re.search(rf"\b{name} {NUMBER} (?:nats )?(?:better )?\({NUMBER} … {NUMBER}", text)
      assert said and numbers(said[0]) == pytest.approx(expected, abs=6e-4), name


def test_what_formats_and_methods_cost_is_of_the_packed_runs(ladder):
  runs = [run for run in ladder[0] if run.config.quant.recipe == "none" and run.config.seed == 0]
  frame = predictors.frame([run for run in runs if list(run.path.glob("eval/*"))])
  of = frame.set_index(["recipe", "method", "optimizer"]).loss_difference
  section = markdown.read("colabs/README.md").split("## Which format and which method")[1]
  table = markdown.tables(section)[0]
  assert len(table.rows) == 16
  for recipe, method, *cells in table.rows:
    found = of[recipe.strip("`"), method.strip("`")][table.header[2:]]
    assert numbers(" ".join(cells)) == pytest.approx([*found], abs=6e-5), (recipe, method)
  costs = np.array([numbers(" ".join(cells)) for _, _, *cells in table.rows])
  agreements = stats.spearmanr(costs.T)[0][np.triu_indices(16, 1)]
  ordered = np.argsort(costs)[:, :2]
  two = sum({table.header[2 + i] for i in row} == {"scion", "shampoo"} for row in ordered)
  said = re.search(
    rf"mean Spearman of {NUMBER} \(least {NUMBER}\).+?cheapest two in (\w+)\.",
    " ".join(section.split()),
  )
  assert said and numbers(" ".join(said.groups()[:2])) == pytest.approx(
    [agreements.mean(), agreements.min()], abs=6e-3
  )
  assert (said[3], two) == ("twelve", 12)


def test_what_models_answer_is_of_the_packed_runs(ladder):
  full = [run for run in ladder[0] if (run.config.quant.recipe, run.config.seed) == ("none", 0)]
  found = ptq_degradation.degradation_cells(full)
  found = found[found["study/acc_norm"].notna()].set_index("optimizer")
  scores = {f"{task}_olmo/acc_norm" for task in ("piqa", "hellaswag", "arc_easy")}
  assert len(found) == 6 and scores < set(found)
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "bits per byte", "study: mean of the next three", "PIQA", "HellaSwag"),
    *("ARC-Easy", "`continuation`", "`last_word`", "its perplexity"),
  )
  names = "study", "piqa_olmo", "hellaswag_olmo", "arc_easy_olmo", "continuation"
  accuracies = [*(f"{name}/acc_norm" for name in names), "last_word/acc"]
  assert rows[0][0] == "chance" and {row[0] for row in rows[1:]} == set(found.index)
  for name, bits, *cells in rows[1:]:
    of = found.loc[name]
    assert float(bits) == pytest.approx(of.bits_per_byte, abs=6e-5)
    told = [number for score in accuracies for number in (of[score], of[f"{score}_stderr"])]
    assert numbers(" ".join(cells[:-1])) == pytest.approx(told, abs=6e-5)
    said = [float(number) for number in cells[-1].replace(",", "").split("±")]
    perplexity = [of["last_word/perplexity"], of["last_word/perplexity_stderr"]]
    assert said == pytest.approx(perplexity, abs=0.6)


def test_which_optimizers_seeds_tell_apart_is_of_the_packed_runs(at_tuned_rates):
  compared = ptq_degradation.compare_optimizers(at_tuned_rates)
  apart = {one.name: (method, one) for _, method, one in compared if not one.tie}
  assert {method for method, _ in apart.values()} == {"hadamard"}
  text = markdown.read("colabs/README.md").replace("\n", " ")
  said = re.search(
    rf"Muon from PSGD, {NUMBER}, p (\.\d+) .+?Shampoo, {NUMBER}, p (\.\d+); SOAP from Shampoo, "
    rf"{NUMBER}, p (\.\d+)\)",
    text,
  )
  assert said and len(apart) == 3
  pairs = [apart[name][1] for name in ("psgd - muon", "shampoo - muon", "soap - shampoo")]
  expected = [number for one in pairs for number in (abs(one.value), one.p)]
  assert [float(number) for number in said.groups()] == pytest.approx(expected, abs=6e-4)


def test_what_quantization_costs_by_learning_rate_is_of_the_packed_runs():
  packed = packed_runs.find_runs(ROOT / "colabs" / "results" / "rates.tar.xz")
  in_turn = [run for run in packed if "/groups/" not in run.name]
  runs = [run for run in in_turn if run.config.seed == 0]
  frame = predictors.frame(runs, but=("learning_rate",))
  frame = frame[(frame.recipe == "rtn_w4a4") & frame.method.isin(["rtn", "hadamard"])]
  of = frame.set_index(["optimizer", "learning_rate", "method"])
  text = markdown.read("colabs/README.md").split("## How much of what quantization costs")[1]
  text = " ".join(text.split())
  columns = "optimizer", "rate", "full precision", "rtn", "hadamard", "MMR of linear inputs"
  rows = markdown.table_of("colabs/README.md", *columns)
  assert len(rows) == len(runs)
  for name, rate, *cells in rows:
    rtn, hadamard = (of.loc[name, float(rate), method] for method in ("rtn", "hadamard"))
    assert numbers(" ".join(cells[:3])) == pytest.approx(
      [rtn.full_precision_loss, rtn.loss_difference, hadamard.loss_difference], abs=6e-5
    )
    assert numbers(cells[3])[0] == pytest.approx(rtn["max_to_median/linear"], abs=6e-3)
  ranks = [
    frame[frame.method == method][["loss_difference", "R_L"]].corr("spearman").iloc[0, 1]
    for method in ("rtn", "hadamard")
  ]
  said = re.search(rf"Spearman {NUMBER} \(rtn\) and {NUMBER} \(hadamard", text)
  assert said and numbers(said[0]) == pytest.approx(ranks, abs=6e-3)
  ranks = [
    frame[frame.method == method][["loss_difference", "R_L_centred"]].corr("spearman").iloc[0, 1]
    for method in ("rtn", "hadamard")
  ]
  said = re.search(rf"R_L_centred {NUMBER} and {NUMBER} \(", text)
  assert said and numbers(said[0]) == pytest.approx(ranks, abs=6e-3)
  rotated = frame[(frame.method == "hadamard") & (frame["max_to_median/linear"] < 14)]
  assert len(rotated) == len(runs) - 1, "without AdamW at 0.3"
  logs = np.log(rotated.loss_difference)
  between = logs.groupby(rotated.optimizer).transform("mean").var(ddof=0) / logs.var(ddof=0)
  shares = re.search(r"(\d+) % of the variance .+? and (\d+) % between", text)
  assert shares and int(shares[1]) == round(100 * between) == 100 - int(shares[2])
  assert f"{shares[1]} % of the variance of the log cost" in markdown.read("colabs/README.md")
  adamw = predictors.frame(
    [run for run in in_turn if run.config.optimizer.learning_rate in (0.1, 0.3)],
    but=("learning_rate",),
  ).query("optimizer == 'adamw' and recipe == 'rtn_w4a4'")
  means = adamw.groupby(["method", "learning_rate"]).mean(numeric_only=True)
  assert set(adamw.groupby("learning_rate").seed.nunique()) == {2}
  losses, rounded, rotated = re.search(
    r"two seeds (.+?)\)\. Rounded .+? lose (.+?) nats; after a rotation, (.+?)\. -", text
  ).groups()
  assert numbers(losses) == pytest.approx([*means.full_precision_loss["rtn"]], abs=6e-5)
  assert numbers(rounded) == pytest.approx([*means.loss_difference["rtn"]], abs=6e-5)
  assert numbers(rotated) == pytest.approx([*means.loss_difference["hadamard"]], abs=6e-5)
  rotated = frame[frame.method == "hadamard"]
  found = [
    rotated[[name, "loss_difference"]].dropna().corr("spearman").iloc[0, 1]
    for name in ("R_L", "R_L_centred", "max_to_median/linear")
  ]
  screen = re.search(
    rf"Spearman {NUMBER},.+?R_L_centred, devised here\) by {NUMBER}, outliers by {NUMBER} \(",
    markdown.read("README.md").replace("\n", " "),
  )
  assert screen and numbers(" ".join(screen.groups())) == pytest.approx(found, abs=6e-3)


def test_what_groups_of_parameters_do_is_of_the_packed_runs():
  found = {}
  packed = packed_runs.find_runs(ROOT / "colabs" / "results" / "rates.tar.xz")
  for run in (run for run in packed if run.config.seed == 0):
    groups = run.config.optimizer.groups
    rates = (groups[of].optimizer.learning_rate for of in ("hidden", "embedding", "vector"))
    cells = predictors.frame([run]).query("recipe == 'rtn_w4a4'").set_index("method")
    found[run.config.optimizer.name, *rates] = cells
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "hidden matrices", "embedding", "gains"),
    *("full precision", "rtn", "hadamard", "MMR of linear inputs"),
  )
  assert len(rows) >= 9
  for name, hidden, embedding, gains, *cells in rows:
    of = found[name, float(hidden), float(embedding), float(gains)]
    assert numbers(" ".join(cells[:3])) == pytest.approx(
      [of.full_precision_loss["rtn"], *of.loss_difference[["rtn", "hadamard"]]], abs=6e-5
    )
    outliers = of["max_to_median/linear"]["rtn"]
    assert numbers(cells[3])[0] == pytest.approx(outliers, abs=6e-3)


NORMS = {"study": "ladder.tar.xz/0.3m/none", "before": "variants.tar.xz/pre_norm"}
NORMS["single gain"] = "variants.tar.xz/single_gain"


def test_what_norms_do_is_of_the_packed_runs():
  of = {}
  for norms, place in NORMS.items():
    runs = packed_runs.find_runs(ROOT / "colabs" / "results" / place)
    if norms == "study":
      runs += packed_runs.find_runs(ROOT / "colabs" / "results" / "rates.tar.xz" / "none")
      named = {run.name.partition(".tar.xz/")[2].partition("none/")[2]: run for run in runs}
      runs = list(named.values())  # once each
    frame = predictors.frame(
      [run for run in runs if list(run.path.glob("eval/*"))], but=("learning_rate",)
    )
    for key, cells in frame.query("recipe == 'rtn_w4a4'").groupby(["optimizer", "learning_rate"]):
      of[norms, *key] = cells.set_index("method")
  rows = markdown.table_of(
    "colabs/README.md",
    *("norms", "optimizer", "learning rate", "full precision", "rtn", "hadamard"),
    *("MMR of linear inputs", "seeds"),
  )
  assert len(rows) >= 13
  for norms, name, rate, full, rtn, hadamard, outliers, seeds in rows:
    cells = of[norms, name, float(rate.strip("*"))]
    assert len(cells.loc[["rtn"]]) == int(seeds)
    found = [estimate(cells.full_precision_loss[["rtn"]])]
    found += [estimate(cells.loss_difference[[method]]) for method in ("rtn", "hadamard")]
    for said, value in zip((full, rtn, hadamard), found, strict=True):
      expected = [*value][: 1 if seeds == "1" else 2]
      assert numbers(said) == pytest.approx(expected, abs=6e-5), (norms, name, rate)
    mean = cells["max_to_median/linear"][["rtn"]].mean()
    assert numbers(outliers)[0] == pytest.approx(mean, abs=6e-3)


def test_what_error_predicts_across_norms_is_of_the_packed_runs():
  results, frames = ROOT / "colabs" / "results", []
  for place in ("rates.tar.xz", "variants.tar.xz/pre_norm", "variants.tar.xz/single_gain"):
    runs = [run for run in packed_runs.find_runs(results / place) if "/groups/" not in run.name]
    # One by one: runs of unlike architectures are refused in one frame.
    frames += [predictors.frame([run]) for run in runs if run.config.seed == 0]
  of = pd.concat(frames).query("recipe == 'rtn_w4a4'").set_index("method")
  expected = [
    of.loc[method, ["loss_difference", name]].corr("spearman").iloc[0, 1]
    for name in ("R_L_centred", "R_L")
    for method in ("rtn", "hadamard")
  ]
  said = re.search(
    rf"Over (\d+) models .+? Spearman {NUMBER} \(rtn\) and {NUMBER} .+? by {NUMBER} and {NUMBER}\.",
    markdown.read("colabs/README.md").replace("\n", " "),
  )
  assert said and int(said[1]) == len(frames)
  assert numbers(" ".join(said.groups()[1:])) == pytest.approx(expected, abs=6e-3)


def test_what_four_bits_in_training_cost_is_of_the_packed_runs(ladder):
  compared = {one.name: one for _, one in qat_gap.compare_gaps(qat_gap.qat_gaps(ladder[0])[0])}
  rows = markdown.table_of("colabs/README.md", "gap", "nats", "95 % interval", "p", "told apart")
  assert len(rows) >= 7
  for name, value, interval, p, apart in rows:
    of = compared[name]
    assert [*numbers(value), *numbers(interval)] == pytest.approx(
      [of.value, *of.interval], abs=6e-5
    )
    assert float(p) == pytest.approx(of.p, abs=6e-4) and apart == ("no" if of.tie else "yes")


def test_what_four_bits_cost_along_training_is_of_the_packed_runs():
  runs = packed_runs.find_runs(ROOT / "colabs" / "results" / "variants.tar.xz" / "along")
  of = along_training.frame(runs).set_index(["optimizer", "method", "average", "step"])
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "method", "step 515", "step 1133, the last at the peak rate"),
    *("step 1442, the last", "averaged, step 1133", "averaged, step 1442"),
    *("quantized, nats", "averaged and quantized"),
  )
  assert len(rows) == 12
  faster = 0
  for name, method, *cells in rows:
    averages = ["", "ema"] if cells[-1] else [""]
    at = [("", 515), ("", 1133), ("", 1442), ("ema", 1133), ("ema", 1442)]
    deltas = [100 * of.delta[name, method, *place] for place in at if place[0] in averages]
    assert numbers(" ".join(cells[:5])) == pytest.approx(deltas, abs=6e-3), (name, method)
    quantized = [of.quantized_loss[name, method, average, 1442] for average in averages]
    assert numbers(" ".join(cells[5:])) == pytest.approx(quantized, abs=6e-5), (name, method)
    faster += (deltas[2] - deltas[1]) / 309 > (deltas[1] - deltas[0]) / 618
  assert faster == 9 and "in nine of the twelve rows" in markdown.read("colabs/README.md")


def test_what_four_bits_cost_by_length_is_of_the_packed_runs():
  results, of = ROOT / "colabs" / "results", {}
  for place in ("lengths.tar.xz/10", "ladder.tar.xz/0.3m", "lengths.tar.xz/40"):
    for run in packed_runs.find_runs(results / place):
      c = run.config
      key = c.optimizer.name, c.optimizer.learning_rate, c.tokens_per_parameter, c.seed
      of[c.quant.recipe, *key] = final_metric(run, "eval/loss")
  rates = {"adamw": 0.3, "muon": 0.01, "shampoo": 0.03}
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "tokens per parameter", "full precision, nats", "`quest_w4a4`", "gap"),
  )
  assert len(rows) == 9
  for name, tokens, *cells in rows:
    key = name, rates[name], int(tokens), 0
    full, under = (of[recipe, *key] for recipe in ("none", "quest_w4a4"))
    assert numbers(" ".join(cells)) == pytest.approx([full, under, under - full], abs=6e-5)


def test_what_rounding_costs_by_size_and_length_is_of_the_packed_runs():
  results = ROOT / "colabs" / "results"
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "size", "tokens per parameter", "seeds", "full precision, nats", "rtn", "gptq"),
    *("hadamard", "R_L_centred, hadamard"),
  )
  others = {"soap": 0.1, "psgd": 0.003, "scion": 0.1}
  places = {
    ("0.1m", "20"): ("ladder.tar.xz/0.1m", {"adamw": 0.1, "muon": 0.003, "shampoo": 0.1}),
    ("0.3m", "20"): ("ladder.tar.xz/0.3m", {"adamw": 0.3, "muon": 0.01, "shampoo": 0.03, **others}),
    ("0.6m", "20"): ("ladder_0.6m.tar.xz", {"adamw": 0.1, "muon": 0.01, "shampoo": 0.03, **others}),
    ("0.3m", "10"): ("lengths.tar.xz/10", {"adamw": 0.3, "muon": 0.01, "shampoo": 0.03}),
    ("0.3m", "40"): ("lengths.tar.xz/40", {"adamw": 0.3, "muon": 0.01, "shampoo": 0.03}),
  }
  frames = {}
  for key, (place, rates) in places.items():
    configs = {run: run.config for run in packed_runs.find_runs(results / place)}
    tuned = [
      run
      for run, c in configs.items()
      if c.quant.recipe == "none" and c.optimizer.learning_rate == rates.get(c.optimizer.name)
    ]
    frame = predictors.frame(tuned)
    by_method = frame[frame.recipe == "rtn_w4a4"].set_index(["optimizer", "method"])
    frames[key] = by_method.sort_index()
  assert len(rows) == 21
  costs, errors = [], []
  for name, size, tokens, seeds, *cells, error in rows:
    of = frames[size, tokens].loc[name]
    found = [said_of(of.full_precision_loss[["rtn"]])]
    found += [said_of(of.loss_difference[[method]]) for method in METHODS]
    assert [numbers(cell) for cell in cells] == [pytest.approx(one, abs=6e-5) for one in found]
    assert len(of.loc[["rtn"]]) == int(seeds)
    costs.append(of.loss_difference[["hadamard"]].mean())
    errors.append(of.R_L_centred[["hadamard"]].mean())
    assert numbers(error) == pytest.approx([errors[-1]], abs=6e-5)
  text = markdown.read("colabs/README.md").replace("\n", " ")
  said = text.split("over these twenty-one by")[1].split(";")[0]
  assert numbers(said) == pytest.approx([stats.spearmanr(costs, errors).statistic], abs=6e-3)


@pytest.fixture(scope="module")
def points():
  results = ROOT / "colabs" / "results"
  packs = (packed_runs.find_runs(results / f"{name}.tar.xz") for name in ("ladder", "ladder_0.6m"))
  return law_points.of_runs([run for pack in packs for run in pack])[0]


def test_what_four_bits_cost_by_size_is_of_the_packed_runs(points):
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "size", "rate", "seeds"),
    *("full precision, nats", "under `quest_w4a4`", "gap"),
  )
  of = points.set_index(["optimizer", "size", "recipe", "seed"]).sort_index()
  assert len(rows) == 15
  for name, size, rate, seeds, *cells in rows:
    full, under = (of.loc[name, size, recipe] for recipe in ("none", "quest_w4a4"))
    assert set(full.learning_rate) == set(under.learning_rate) == {float(rate)}, (name, size)
    assert list(full.index) == list(under.index) and len(full) == int(seeds)
    found = [said_of(losses) for losses in (full.loss, under.loss, under.loss - full.loss)]
    assert [numbers(cell) for cell in cells] == [pytest.approx(one, abs=6e-5) for one in found]


@pytest.mark.slow
def test_what_four_bits_leave_of_a_model_s_parameters_is_of_the_packed_runs(points):
  several = points[points.groupby("optimizer")["size"].transform("nunique") > 2]
  own = scaling_law.fit(several, shared=())
  laws = own, scaling_law.fit(several, shared=("E",)), scaling_law.fit(points)
  rows = markdown.table_of(
    "colabs/README.md",
    *("optimizer", "sizes", "ρ, A, α, E its own (the study's fit)", "ρ, A and α its own"),
    *("ρ, A its own", "the study's ρ"),
  )
  assert len(rows) == 6
  for name, sizes, *cells, _ in rows:
    rho = f"rho({name}, quest_w4a4)"
    for law, cell in zip(laws, cells, strict=True):
      assert bool(cell) == (rho in law.params), (name, cell)
      if cell:
        expected = [law.params[rho], *law.intervals[rho].profile]
        assert numbers(cell) == pytest.approx(expected, abs=1.1e-2), name
        assert law.identified[rho], name
    assert int(sizes) == points[points.optimizer == name]["size"].nunique()
  said = re.search(
    r"ρ of AdamW (.+?), Shampoo (.+?), Muon (.+?);", markdown.read("colabs/README.md")
  )
  expected = [own.params[f"rho({name}, quest_w4a4)"] for name in ("adamw", "shampoo", "muon")]
  assert said and [numbers(text)[0] for text in said.groups()] == pytest.approx(expected, abs=6e-3)


def test_what_rounding_costs_at_a_common_loss_is_of_the_packed_runs():
  packed = ROOT / "colabs" / "results" / "variants.tar.xz"
  runs = [run for place in ("along", "common") for run in packed_runs.find_runs(packed / place)]
  compared = landings.compare_landings(runs)
  assert compared.missing == []
  of = compared.means.set_index(["optimizer", "way", "method"])
  rows = markdown.table_of(
    "colabs/README.md", *("optimizer", "way", "step", "loss less the common one", "rtn", "hadamard")
  )
  assert len(rows) == len(of) / 2
  for name, way, step, *cells in rows:
    rtn, hadamard = (of.loc[name, way, method] for method in ("rtn", "hadamard"))
    found = [rtn.off, rtn.value, hadamard.value]
    assert int(step) == rtn.step
    assert numbers(" ".join(cells)) == pytest.approx(found, abs=6e-5), (name, way)
