"""The table of what methods cost optimizers, from cells as evaluation jobs write them."""

import json
import math

import pytest
from scipy import stats

from beyond_outliers import config, runs
from beyond_outliers.analysis import ptq_degradation, tables
from configs import adamw, muon, psgd, soap

TIME = "2026-11-23T05:00:00+00:00"


def workdir(root, module, seed, differences, step=2, rate=0.1, documents=0, size="nano", windows=8):
  """A run with evaluated checkpoints; differences: {(recipe, method): of the loss}."""
  folder = root / f"{module.__name__}-{rate}-{seed}"
  c = config.to_dict(
    config.resolve(module.get_config(f"{size},optimizer.learning_rate={rate},seed={seed}"))
  )
  (folder / "eval").mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(c))
  (folder / "manifest.json").write_text(json.dumps({"time": TIME}))
  for (recipe, method), difference in {("none", "none"): None, **differences}.items():
    metrics = (
      {"loss": 4.0}
      if method == "none"
      else {"loss": 4.0, "loss_difference": difference, "agreement": 0.5}
    )
    if method == "gptq":
      metrics["agreement"] = 0.6
    cell = {
      "step": step,
      "recipe": recipe,
      "method": method,
      "metrics": metrics,
      "tasks": {},
      "size_bytes": 1,
    }
    settings = {
      "trained": TIME,
      "data": "a",
      "tokenizer": "b",
      "context": 256,
      "documents": documents,
      "mask_documents": False,
      "calibration_windows": windows if method == "gptq" else 0,
    }
    (folder / "eval" / f"{step}-{recipe}-{method}-{documents}.json").write_text(
      json.dumps({**cell, "settings": settings, "source": {"config": c}})
    )


def test_cells_of_averages_are_taken_only_where_they_are_asked_for(tmp_path):
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  for path in tmp_path.rglob("*-rtn_w4a4-*.json"):
    cell = json.loads(path.read_text())
    cell["metrics"]["loss_difference"] = 0.1
    cell["settings"]["average"] = "ema"
    path.with_stem(path.stem + "ema").write_text(json.dumps(cell))
  found = runs.find(tmp_path)
  raw, ema = (
    ptq_degradation.degradation_cells(found, settings) for settings in (None, {"average": "ema"})
  )
  assert raw.loss_difference.dropna().tolist() == [0.3]
  assert ema.loss_difference.tolist() == [0.1]


def test_rows_are_methods_columns_optimizers_over_seeds(tmp_path):
  for seed, (rtn, gptq) in enumerate([(0.3, 0.1), (0.4, 0.2), (0.5, 0.6)]):
    workdir(tmp_path, adamw, seed, {("rtn_w4a4", "rtn"): rtn, ("rtn_w4a4", "gptq"): gptq})
  workdir(
    tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 9.0}, step=1
  )  # an older checkpoint counts for nothing
  workdir(tmp_path, muon, 0, {("rtn_w4a4", "rtn"): 0.05, ("rtn_w8a8", "rtn"): 0.01})
  found = ptq_degradation.degradation_cells(runs.find(tmp_path))
  assert len(found) == 3 * 3 + 3
  lines = ptq_degradation.degradation_table(found).splitlines()
  assert lines[0] == "| recipe | method | adamw | muon |"
  gptq, rtn = 0.3, 0.4
  errors = [
    math.sqrt(sum((x - mean) ** 2 for x in xs) / 2 / 3)
    for mean, xs in ((gptq, (0.1, 0.2, 0.6)), (rtn, (0.3, 0.4, 0.5)))
  ]
  assert lines[2:] == [
    f"| rtn_w4a4 | rtn | +0.4000 ± {errors[1]:.4f} | **+0.0500** |",
    f"| rtn_w4a4 | gptq | **+0.3000 ± {errors[0]:.4f}** |  |",
    "| rtn_w8a8 | rtn |  | **+0.0100** |",
  ]
  higher = ptq_degradation.degradation_table(found, "agreement", digits=1).splitlines()
  assert higher[2].startswith("| rtn_w4a4 | gptq | **0.6 ± 0.0**") and higher[3].startswith(
    "| rtn_w4a4 | rtn | 0.5 ± 0.0"
  )


def test_optimizers_are_told_apart_by_the_seeds_they_share(tmp_path):
  """By the paired t test after Holm, within a recipe and method; one seed tells nothing, and one
  that broke is no difference."""
  for seed, (one, other) in enumerate([(0.30, 0.10), (0.41, 0.20), (0.49, 0.30), (None, 0.10)]):
    workdir(tmp_path, adamw, seed, {("rtn_w4a4", "rtn"): one, ("rtn_w4a4", "gptq"): 0.1})
    workdir(tmp_path, muon, seed, {("rtn_w4a4", "rtn"): other})
  for seed, cost in enumerate([0.3, 0.3]):
    workdir(tmp_path, soap, seed, {("rtn_w4a4", "rtn"): cost})
  workdir(tmp_path, psgd, 0, {("rtn_w4a4", "rtn"): 0.3})
  found = ptq_degradation.degradation_cells(runs.find(tmp_path))
  compared = ptq_degradation.compare_optimizers(found)
  assert {row[:2] for row in compared} == {("rtn_w4a4", "rtn")}
  assert [(row[2].name, row[2].n) for row in compared] == [
    *(("muon - adamw", 3), ("soap - muon", 2), ("soap - adamw", 2))
  ]
  sure, *others = (row[2] for row in compared)
  assert sure.value == pytest.approx(-0.2) and not sure.tie and all(one.tie for one in others)
  assert sure.p == pytest.approx(3 * stats.ttest_rel([0.3, 0.41, 0.49], [0.1, 0.2, 0.3]).pvalue)
  assert tables.ptq_comparison_table(compared).splitlines()[2].endswith("| 3 | yes |")


def test_a_model_that_broke_is_not_left_out_of_a_mean(tmp_path):
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3, ("rtn_w4a4", "gptq"): 0.2})
  workdir(tmp_path, adamw, 1, {("rtn_w4a4", "rtn"): None, ("rtn_w4a4", "gptq"): 0.2})
  assert "| rtn_w4a4 | rtn | +inf" in ptq_degradation.degradation_table(
    ptq_degradation.degradation_cells(runs.find(tmp_path))
  )


@pytest.mark.parametrize("module,seed", [(adamw, 1), (muon, 0)])
@pytest.mark.parametrize(
  "other,named",
  [
    ({"documents": 3}, "documents"),
    ({"size": "0.3m"}, "size"),
    ({"windows": 128}, "calibration_windows"),
  ],
)
def test_cells_of_other_models_or_measured_on_others_are_refused(
  module, seed, other, named, tmp_path
):
  """Of one optimizer, and of two beside each other."""
  cells = {("rtn_w4a4", "rtn"): 0.3, ("rtn_w4a4", "gptq"): 0.2}
  workdir(tmp_path, adamw, 0, cells)
  workdir(tmp_path, module, seed, cells, **other)
  with pytest.raises(config.ConfigError, match=rf"(all|gptq): the cells have {named} = \["):
    ptq_degradation.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)))


def test_a_seed_counts_once(tmp_path):
  for root in ("one", "two"):
    workdir(tmp_path / root, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  with pytest.raises(
    config.ConfigError,
    match=r"adamw: .*one/.* and .*two/.* have seed 0 and a cell of rtn_w4a4 and rtn",
  ):
    ptq_degradation.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)))


def test_runs_whose_mean_would_say_nothing_are_refused(tmp_path):
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3}, rate=0.3)
  with pytest.raises(
    config.ConfigError,
    match=r"adamw: the cells have learning_rate = \[.*0\.1.*0\.3.*\]; give the runs",
  ):
    ptq_degradation.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)))
  with pytest.raises(
    config.ConfigError,
    match=r"--degradation = 'loss_difference': these runs have no cell of a recipe",
  ):
    ptq_degradation.degradation_table(ptq_degradation.degradation_cells([]))
  for metric, remedy in (
    ("agremeent", "did you mean 'agreement'"),
    ("seed", "expected one of .*loss_difference"),
  ):
    with pytest.raises(
      config.ConfigError, match=rf"--degradation = '{metric}': no cell has it; {remedy}"
    ):
      ptq_degradation.degradation_table(
        ptq_degradation.degradation_cells(runs.find(tmp_path)), metric
      )


@pytest.mark.parametrize("source", [None, {}, {"config": {"size": "nano"}}])
def test_a_cell_that_does_not_say_of_which_run_is_refused_by_name(tmp_path, source):
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  (file,) = tmp_path.glob("*/eval/2-rtn_w4a4-*.json")
  file.write_text(json.dumps({**json.loads(file.read_text()), "source": source}))
  with pytest.raises(config.ConfigError, match=r"step 2, rtn_w4a4, rtn lacks source\.config"):
    ptq_degradation.degradation_cells(runs.find(tmp_path))
