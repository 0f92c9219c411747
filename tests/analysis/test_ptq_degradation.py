"""The table of what methods cost optimizers, from cells as evaluation jobs write them."""

import json
import math

import pytest
import workdirs
from scipy import stats

from beyond_outliers import config, runs
from beyond_outliers.analysis import along_training, predictors, ptq_degradation, report, tables
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
  data = {"directory": "datasets/x", "fingerprint": "a", "tokenizer": "b"}
  (folder / "manifest.json").write_text(json.dumps({"time": TIME, "data": data}))
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
  lines = tables.degradation_table(found).splitlines()
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
  higher = tables.degradation_table(found, "agreement", digits=1).splitlines()
  assert higher[2].startswith("| rtn_w4a4 | gptq | **0.6 ± 0.0**") and higher[3].startswith(
    "| rtn_w4a4 | rtn | 0.5 ± 0.0"
  )


def test_optimizers_are_told_apart_by_the_seeds_they_share(tmp_path):
  """By the paired t test with Holm's correction, within a recipe and method. A single seed tells
  nothing, and a broken one gives no difference."""
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
  assert "| rtn_w4a4 | rtn | +inf" in tables.degradation_table(
    ptq_degradation.degradation_cells(runs.find(tmp_path))
  )


@pytest.mark.parametrize("module,seed", [(adamw, 1), (muon, 0)])
@pytest.mark.parametrize(
  "other,named",
  [
    ({"documents": 3}, r"(all|gptq): the cells have documents = \["),
    ({"size": "0.3m"}, "batch_size: .* such runs cannot be compared"),
    ({"windows": 128}, r"(all|gptq): the cells have calibration_windows = \["),
  ],
)
def test_cells_of_other_models_or_measured_on_others_are_refused(
  module, seed, other, named, tmp_path
):
  """Within one optimizer's cells, and between two optimizers'."""
  cells = {("rtn_w4a4", "rtn"): 0.3, ("rtn_w4a4", "gptq"): 0.2}
  workdir(tmp_path, adamw, 0, cells)
  workdir(tmp_path, module, seed, cells, **other)
  with pytest.raises(config.ConfigError, match=named):
    tables.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)))


def test_a_seed_counts_once(tmp_path):
  for root in ("one", "two"):
    workdir(tmp_path / root, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  with pytest.raises(
    config.ConfigError,
    match=r"adamw: .*one/.* and .*two/.* have seed 0 and a cell of rtn_w4a4 and rtn",
  ):
    tables.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)))


def test_runs_whose_mean_would_say_nothing_are_refused(tmp_path):
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3}, rate=0.3)
  with pytest.raises(
    config.ConfigError,
    match=r"adamw: the cells have learning_rate = \[.*0\.1.*0\.3.*\]; give runs of one",
  ):
    tables.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)))
  with pytest.raises(
    config.ConfigError,
    match=r"--degradation = 'loss_difference': these runs have no cell of a recipe",
  ):
    tables.degradation_table(ptq_degradation.degradation_cells([]))
  for metric, remedy in (
    ("agremeent", "did you mean 'agreement'"),
    ("seed", "expected one of .*loss_difference"),
  ):
    with pytest.raises(
      config.ConfigError, match=rf"--degradation = '{metric}': no cell has it; {remedy}"
    ):
      tables.degradation_table(ptq_degradation.degradation_cells(runs.find(tmp_path)), metric)


@pytest.mark.parametrize("source", [None, {}, {"config": {"size": "nano"}}])
def test_a_cell_that_does_not_say_of_which_run_is_refused_by_name(tmp_path, source):
  workdir(tmp_path, adamw, 0, {("rtn_w4a4", "rtn"): 0.3})
  (file,) = tmp_path.glob("*/eval/2-rtn_w4a4-*.json")
  file.write_text(json.dumps({**json.loads(file.read_text()), "source": source}))
  with pytest.raises(config.ConfigError, match=r"step 2, rtn_w4a4, rtn lacks source\.config"):
    ptq_degradation.degradation_cells(runs.find(tmp_path))


def quantized(root, seed=0, *, module=adamw, at=(200,), cost=0.2, status="done", run=None, **cells):
  """A run of 200 steps with cells of these; run: options of `workdirs.workdir`."""
  losses = {100: 5.0, 200: 4.5}
  folder = workdirs.workdir(root, module, 0.1, seed, losses, status=status, **(run or {}))
  for step in at:
    workdirs.cell(folder, step, "rtn_w4a4", "rtn", {"loss": 5.0, "loss_difference": cost}, **cells)
  return folder


def printed(root, capsys, settings=None, folders=(), metric="loss_difference"):
  report.print_degradation(runs.find(root), metric, settings or {}, folders)
  return capsys.readouterr().out


@pytest.mark.parametrize(
  "argument",
  ["model.blocks=3", "batch_size=4", "schedule.name=cosine", "optimizer.weight_decay=0.5"],
)
def test_every_table_of_cells_is_of_runs_that_compare(tmp_path, argument):
  quantized(tmp_path)
  quantized(tmp_path, 1, run={"argument": f",{argument}"})
  found = runs.find(tmp_path)
  for read in (*(ptq_degradation.degradation_cells, predictors.frame, along_training.frame),):
    with pytest.raises(
      config.ConfigError, match=r".+ in .*-0, .+ in .*-1: such runs cannot be compared"
    ):
      read(found)


def test_cells_are_of_the_last_step_or_of_one_place(tmp_path, capsys):
  """A run that is not done, or was not evaluated at its end, is in no mean with others."""
  behind = quantized(tmp_path, 1, at=(100,), cost=0.8, status="preempted")
  quantized(tmp_path, 0, module=muon, at=(150,))
  with pytest.raises(config.ConfigError, match=r"all: the cells have step / steps = \[0.5, 0.75\]"):
    printed(tmp_path, capsys)
  quantized(tmp_path, 0, at=(100, 200))
  quantized(tmp_path, 2, at=(), status="diverged")
  text = printed(tmp_path, capsys)
  assert "| rtn_w4a4 | rtn | **+0.2000** |" in text
  assert text.splitlines()[-3:] == [
    f"{behind}: preempted at step 200 of 200, no cell of it counts",
    f"{behind.parent}/none-0.1-2: diverged at step 200 of 200, no cell of it counts",
    f"{tmp_path}/muon/none-0.1-0: done at step 200 of 200, no cell of it counts",
  ]


def test_cells_of_a_run_that_is_not_done_are_told(tmp_path, capsys):
  folder = quantized(tmp_path, status="preempted")
  told = f"{folder}: preempted at step 200 of 200, its cells are of step 200"
  assert printed(tmp_path, capsys).splitlines()[-1] == told


def recorded(folder, **fields):
  """Adds fields to the quantized cell of a run."""
  (path,) = folder.glob("eval/*-rtn_w4a4-rtn-*.json")
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_cells_under_other_settings_of_jax_are_refused_or_chosen(tmp_path, capsys):
  """So are scores of tasks: they belong to no cell with other settings."""
  one = quantized(tmp_path)
  quantized(tmp_path, 1, cost=0.4, jax_enable_x64=True)
  with pytest.raises(
    config.ConfigError, match=r"have jax_enable_x64 = \['', True\]; .*--settings=jax_enable_x64="
  ):
    printed(tmp_path, capsys)
  assert "+0.4000" in printed(tmp_path, capsys, {"jax_enable_x64": "True"})
  under = {"content": "a" * 64, "jax_enable_x64": True, "tasks": {"piqa": {"acc": 0.9}}}
  workdirs.cell(one, 200, "rtn_w4a4", "rtn", {"loss": 5.1, "loss_difference": 0.3}, **under)
  scores = ptq_degradation.degradation_cells(runs.find(one))["piqa/acc"]
  assert sorted(scores.isna()) == [False, True]


def test_an_average_of_fewer_checkpoints_than_it_says_is_left_out(tmp_path, capsys):
  recorded(quantized(tmp_path, 0, average="last:3"), averaged=[100, 150, 200])
  short = quantized(tmp_path, 1, cost=9.0, average="last:3")
  recorded(short, averaged=[200])
  text = printed(tmp_path, capsys, {"average": "last:3"})
  assert "**+0.2000**" in text
  assert f"{short}: step 200: last:3 is the mean of only 1, of steps 200; it is left out" in text


def test_averages_of_one_name_are_made_alike(tmp_path, capsys):
  recorded(quantized(tmp_path, 0, average="last:2"), averaged=[100, 200])
  recorded(quantized(tmp_path, 1, average="last:2"), averaged=[150, 200])
  with pytest.raises(config.ConfigError, match=r"last:2: .*\[0\.5, 1\.0\].* in .*0\.75"):
    printed(tmp_path, capsys, {"average": "last:2"})


def test_matrices_that_a_method_could_not_quantize_are_told(tmp_path, capsys):
  fallback = {"matrix": "layers/0/mlp/up", "rounding": "nearest", "damping": None}
  folder = quantized(tmp_path)
  recorded(folder, fallbacks=[fallback])
  told = f"{folder}: rtn_w4a4, rtn failed on layers/0/mlp/up, quantized in another way instead"
  assert told in printed(tmp_path, capsys)


def test_a_misspelt_setting_is_named_and_so_are_cells_of_other_runs(tmp_path, capsys):
  quantized(tmp_path / "runs")
  with pytest.raises(config.ConfigError, match=r"--settings = 'document': .* mean 'documents'"):
    printed(tmp_path / "runs", capsys, {"document": "0"})
  others = quantized(tmp_path / "others", module=muon) / "eval"
  alone = f"{others}: 1 of 1 cells are of none of these runs"
  assert alone in printed(tmp_path / "runs", capsys, folders=[others])
  without = quantized(tmp_path / "without", at=())
  with pytest.raises(config.ConfigError, match=rf"no cell of a recipe \({alone}\); measure some"):
    printed(without, capsys, folders=[others])


def asked(folder, content, accuracy):
  """The same cell with the scores of a task whose questions have this hash."""
  metrics, scores = {"loss": 5.0, "loss_difference": 0.2}, {"piqa": {"acc": accuracy}}
  workdirs.cell(folder, 200, "rtn_w4a4", "rtn", metrics, tasks=scores, content=content)


def test_unlike_questions_under_one_name_are_columns_of_their_own(tmp_path, capsys):
  """In cells of two runs, and of one run that was asked both."""
  one, other = quantized(tmp_path, 0), quantized(tmp_path, 1)
  asked(one, "a" * 64, 0.2)
  asked(other, "a" * 64, 0.4)
  assert "**0.3000 ± 0.1000**" in printed(tmp_path, capsys, metric="piqa/acc")
  asked(one, "b" * 64, 0.9)
  cells = ptq_degradation.degradation_cells(runs.find(tmp_path)).set_index("seed")
  assert cells["piqa@aaaaaaaa/acc"].to_dict() == {0: 0.2, 1: 0.4}
  assert cells["piqa@bbbbbbbb/acc"][0] == 0.9 and "piqa/acc" not in cells
  with pytest.raises(config.ConfigError, match=r"piqa/acc.* mean 'piqa@"):
    printed(tmp_path, capsys, metric="piqa/acc")
