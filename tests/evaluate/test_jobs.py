"""Evaluation jobs on small runs: the contents of cells, what is measured again, and what is refused
before anything is measured."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import commands
import jax
import numpy as np
import pytest
import small_models

from beyond_outliers import config, data, quant, runs, train
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.analysis import ptq_degradation
from beyond_outliers.config.sums import SUMS, unsealed
from beyond_outliers.data import sums, tfds, tokenizers
from beyond_outliers.errors import CheckpointError, WorkdirError
from beyond_outliers.evaluate import job as job_lib
from beyond_outliers.evaluate import (
  offline_tasks,
  propagation,
  quantization,
  results,
  table,
  task_suite,
)
from beyond_outliers.evaluate import plan as plan_lib
from beyond_outliers.evaluate.evaluator import Evaluator
from beyond_outliers.evaluate.plan import Cell, cell_settings, plan_cells
from beyond_outliers.evaluate.target import (
  GoneError,
  HuggingFaceModel,
  OneCheckpoint,
  RunCheckpoints,
)
from beyond_outliers.model import hf, transformer

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = {
  "model.blocks": 1,
  "steps": 2,
  "checkpoint.every": 1,
  "eval.every": 1,
  "log.outliers_every": 2,
}
POLL = 0.125


def measures_once(measured, measure):
  """An evaluator with one cell per step, which is missing until the step is in `measured`."""
  return types.SimpleNamespace(
    make_folder=lambda: None,
    missing=lambda step: [Cell("none", "none")] * (step not in measured),
    measure=measure,
  )


PLAN = (["rtn_w4a4"], ["rtn", "gptq"])


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
  """A run with two checkpoints."""
  path = tmp_path_factory.mktemp("evaluate") / "run"
  train.run(tiny_config(**SHAPE, **{"optimizer.learning_rate": 3e-2}), path, say=lambda text: None)
  return path


@pytest.fixture(scope="module")
def quantized_workdir(tiny_config, tmp_path_factory):
  """A run under QuEST, with a head of 8 bits, on documents that a token begins."""
  path = tmp_path_factory.mktemp("evaluate") / "quantized"
  rules = {
    "quant.recipe": "quest_w4a4",
    "quant.rules.head.recipe": "rtn_w8a8",
    "data.separator": "bos",
  }
  train.run(tiny_config(**SHAPE, **rules), path, say=lambda text: None)
  return path


@pytest.fixture(scope="module")
def measured(workdir):
  """(run, evaluator, its cells at step 2 by method)"""
  target = RunCheckpoints(workdir)
  evaluator = Evaluator(target, plan_cells(target, *PLAN), calibration_windows=12)
  params = target.params(2)
  assert evaluator.missing(2) == evaluator.cells and len(evaluator.cells) == 3
  return (
    runs.open(workdir),
    evaluator,
    {cell.method: evaluator.measure(2, params, cell) for cell in evaluator.missing(2)},
  )


def test_the_model_as_it_is_has_the_loss_that_training_recorded(measured):
  run, _, found = measured
  recorded = run.metrics().loc[2]
  for name in ("loss", "loss_stderr", "bits_per_byte"):
    np.testing.assert_allclose(found["none"]["metrics"][name], recorded[f"eval/{name}"], rtol=1e-5)
  assert "kl" not in found["none"]["metrics"]


def test_cells_of_an_average_are_others_and_say_so(workdir, measured):
  """In their settings, so that those of the parameters stay what they were."""
  _, evaluator, found = measured
  (cell, *_) = evaluator.cells
  plain, average = (cell_settings(RunCheckpoints(workdir, of), cell, 12) for of in ("", "last:2"))
  assert average == {**plain, "average": "last:2"} and plain == found["none"]["settings"]
  one = {"step": 2, "recipe": "none", "method": "none", "metrics": {}, "tasks": {}, "seconds": {}}
  task = {**one, "settings": {"task": "t", "trained": 1}}
  assert results._same_model({**one, "settings": {"trained": 1}}, task)
  assert not results._same_model({**one, "settings": {"trained": 1, "average": "ema"}}, task)


@pytest.mark.slow
def test_an_average_is_evaluated(workdir, tmp_path):
  """It has the loss of the mean of the checkpoints; its file says which they are."""
  target = RunCheckpoints(workdir, "last:5")
  evaluator = Evaluator(target, plan_cells(target, [], []), tmp_path)
  run, (cell,) = runs.open(workdir), evaluator.cells
  mean = jax.tree.map(lambda x, y: (x + y) / 2, run.params(1), run.params(2))
  found = evaluator.measure(2, target.params(2), cell)
  plain = Evaluator(RunCheckpoints(workdir), [cell], tmp_path)
  assert found["averaged"] == [1, 2] and plain.missing(2) == [cell]
  assert found["metrics"]["loss"] == plain.measure(2, mean, cell)["metrics"]["loss"]
  assert len(list(tmp_path.iterdir())) == 2


def test_the_model_as_it_is_has_the_outliers_that_training_records(measured):
  run, _, found = measured
  recorded = (
    run.metrics()
    .loc[2]
    .filter(like="outliers/")
    .drop("outliers/seconds", errors="ignore")
    .to_dict()
  )
  metrics = {
    name: value for name, value in found["none"]["metrics"].items() if name.startswith("outliers/")
  }
  assert metrics.keys() == recorded.keys() and len(metrics) == 6 * 4
  assert metrics == pytest.approx(recorded, rel=1e-4)
  assert not any(
    "outliers" in name for name in found["rtn"]["metrics"]
  ) and "outliers" not in table.results_table([found["none"]])


def test_a_cell_compares_with_full_precision(measured):
  _, _, found = measured
  for method in ("rtn", "gptq"):
    metrics = found[method]["metrics"]
    np.testing.assert_allclose(
      metrics["reference_loss"], found["none"]["metrics"]["loss"], rtol=1e-6
    )
    np.testing.assert_allclose(
      metrics["loss"] - metrics["reference_loss"], metrics["loss_difference"], atol=1e-6
    )
    assert 0 < metrics["kl"] < 1 and 0 < metrics["agreement"] < 1
    for name in ("loss_difference", "kl", "agreement"):
      low, high = metrics[f"{name}_interval"]
      assert low <= metrics[name] <= high
  assert found["rtn"]["metrics"]["kl"] != found["gptq"]["metrics"]["kl"]
  assert found["rtn"]["size_bytes"] < found["none"]["size_bytes"]


def files(workdir, step, recipe, method):
  return sorted((workdir / "eval").glob(f"{step}-{recipe}-{method}-*.json"))


def test_a_cell_is_read_alone(measured):
  run, evaluator, found = measured
  (path,) = files(run.path, 2, "rtn_w4a4", "gptq")
  written, _ = unsealed(json.loads(path.read_text()))
  assert {**written, "tasks": {}, "seconds": {**written["seconds"], "tasks": 0}} == found["gptq"]
  assert config.resolve(written["source"]["config"]) == run.config
  assert written["settings"]["data"] == run.manifest["data"]["fingerprint"]
  assert written["packages"]["jax"] == jax.__version__ and written["seconds"]["evaluate"] > 0
  assert (
    found["gptq"]["settings"]["calibration_windows"] == 12
    and found["rtn"]["settings"]["calibration_windows"] == 0
  )
  assert len(list((run.path / "eval").iterdir())) == 3
  assert len(table.results_table(evaluator.results()).splitlines()) == 4


def test_a_cell_tells_of_fallbacks_where_there_are_some(measured, tmp_path, monkeypatch):
  _, first, found = measured
  assert not any("fallbacks" in cell for cell in found.values())
  evaluator = Evaluator(first.target, first.cells[1:2], tmp_path)
  fallback = quant.ptq.Fallback("layers/0/mlp/up", "gptq", 0.1)
  q = types.SimpleNamespace(model=None, params={}, size_bytes=np.int64(1), fallbacks=(fallback,))
  monkeypatch.setattr(evaluator, "_quantize", lambda params, cell: q)
  monkeypatch.setattr(evaluator, "_metrics", lambda *arguments: {"loss": np.float32(np.nan)})
  cell = evaluator.measure(2, {}, first.cells[1])
  assert cell["fallbacks"] == [{"matrix": "layers/0/mlp/up", "rounding": "gptq", "damping": 0.1}]
  assert (cell["metrics"], cell["size_bytes"]) == ({"loss": None}, 1)


def test_other_settings_leave_what_was_measured_alone(workdir, measured, tmp_path):
  """A short evaluation in addition to a full one, which is then asked for again."""
  shutil.copytree(workdir, tmp_path / "run")
  before = {path: path.read_text() for path in (tmp_path / "run" / "eval").iterdir()}
  none = measured[1].cells[:1]
  quick = Evaluator(RunCheckpoints(tmp_path / "run", documents=2), none)
  assert quick.missing(2) == none
  found = quick.measure(2, quick.target.params(2), none[0])
  assert (
    found["metrics"]["documents"] == 2 and quick.missing(2) == [] and quick.results() == [found]
  )
  whole = Evaluator(RunCheckpoints(tmp_path / "run"), measured[1].cells, calibration_windows=12)
  assert whole.missing(2) == [] and whole.results() == list(measured[2].values())
  assert {path: path.read_text() for path in before} == before
  every = ptq_degradation.degradation_cells([runs.open(tmp_path / "run")])
  assert sorted(every.documents) == [0, 0, 0, 2]
  assert list(
    ptq_degradation.degradation_cells([runs.open(tmp_path / "run")], {"documents": "2"}).loss
  ) == [found["metrics"]["loss"]]


def test_runs_that_share_a_folder_share_no_cell(workdir, measured, tmp_path):
  """Not even if they began in the same second; and a resumed run keeps its own."""
  one, other = tmp_path / "one", tmp_path / "other"
  for folder in (one, other):
    shutil.copytree(workdir, folder)
  manifest = json.loads((other / "manifest.json").read_text())
  del manifest["sha256"]
  (other / "manifest.json").write_text(json.dumps({**manifest, "id": "another"}))
  (one / "manifest.json").write_text(json.dumps({**manifest, "resumed": [manifest]}))
  resumed, new = (
    Evaluator(RunCheckpoints(folder), measured[1].cells, workdir / "eval", calibration_windows=12)
    for folder in (one, other)
  )
  assert resumed.missing(2) == [] and len(new.missing(2)) == 3 and new.results() == []
  for folder in (one, other):
    shutil.rmtree(folder / "eval")
  reported = ptq_degradation.degradation_cells(
    [runs.open(one), runs.open(other)], folders=[workdir / "eval"]
  )
  assert set(reported.run) == {str(one)} and len(reported) == 3


@pytest.mark.parametrize("content", ["", '{"step": 2, "recipe"', "[]", '{"foo": 1}'])
def test_what_is_no_cell_counts_as_missing_and_is_named_once(content, workdir, measured, tmp_path):
  shutil.copytree(workdir / "eval", tmp_path / "eval")
  (path,) = files(tmp_path, 2, "rtn_w4a4", "rtn")
  for broken in (path, tmp_path / "eval" / "foo-bar.json"):
    broken.write_text(content)
  said = []
  evaluator = Evaluator(
    RunCheckpoints(workdir),
    measured[1].cells,
    tmp_path / "eval",
    calibration_windows=12,
    warn=said.append,
  )
  assert evaluator.missing(2) == [measured[1].cells[1]]
  assert evaluator.results() == [measured[2]["none"], measured[2]["gptq"]]
  assert sorted(line.partition(" ")[0] for line in said) == sorted(
    [str(path), str(tmp_path / "eval" / "foo-bar.json")]
  )


def test_cells_of_earlier_versions_are_left_alone_and_reported(workdir, measured, tmp_path):
  """These had no hash in their names, identified trainings by time, and contained their tasks."""
  shutil.copytree(workdir, tmp_path / "run")
  run, folder = runs.open(tmp_path / "run"), tmp_path / "run" / "eval"
  shutil.rmtree(folder)
  folder.mkdir()
  for method, cell in measured[2].items():
    settings = {name: value for name, value in cell["settings"].items() if name != "version"} | {
      "trained": run.manifest["time"]
    }
    old = {**cell, "settings": settings, "tasks": {"piqa": {"acc": 0.5}}, "asked": ["piqa"]}
    (folder / f"2-{cell['recipe']}-{method}.json").write_text(json.dumps(old))
  evaluator = Evaluator(RunCheckpoints(tmp_path / "run"), measured[1].cells, calibration_windows=12)
  assert evaluator.missing(2) == measured[1].cells and evaluator.results() == []
  found = ptq_degradation.degradation_cells([run])
  assert sorted(found.method) == ["gptq", "none", "rtn"] and set(found["piqa/acc"]) == {0.5}
  evaluator.measure(2, evaluator.target.params(2), measured[1].cells[1])
  assert (
    list(ptq_degradation.degradation_cells([run]).method) == ["rtn"]
    and len(ptq_degradation.degradation_cells([run], {"version": "1"})) == 3
  )


def test_only_what_the_settings_change_is_measured_again(measured, workdir, monkeypatch):
  _, evaluator, _ = measured
  assert evaluator.missing(2) == [] and evaluator.missing(1) == evaluator.cells

  def again(windows=12, **options):
    target = RunCheckpoints(workdir, **options)
    return Evaluator(target, evaluator.cells, calibration_windows=windows)

  assert again().missing(2) == []
  assert [cell.method for cell in again(windows=8).missing(2)] == ["gptq"]
  assert again(documents=2).missing(2) == again(context=16).missing(2) == evaluator.cells
  assert again(batch_size=16).missing(2) == []
  with jax.default_matmul_precision("float32"):
    assert again().missing(2) == evaluator.cells
  monkeypatch.setattr(plan_lib, "VERSION", plan_lib.VERSION + 1)
  assert again().missing(2) == evaluator.cells


@pytest.mark.parametrize("reader", ["shards", "tfds"])
def test_calibration_sees_the_same_training_windows_whatever_the_batches(
  reader, workdir, corpus, tiny_config, tmp_path
):
  """And however many readers a run has."""
  text = RunCheckpoints(workdir).text
  if reader == "tfds":
    texts = (path.read_text() for path in sorted(corpus.iterdir()))
    records = {
      "data.source": "tfds",
      "data.path": tfds.write_documents(texts, str(tmp_path)),
      "data.reader": "tfds",
      "data.validation": "fraction:0.1",
      "data.field": "text",
    }
    section = tiny_config(**records).data
    text = dataclasses.replace(
      text, dataset=data.prepare(section, log=lambda text: None), section=section
    )

  def calibration(**options):
    return quantization.calibration_batches(dataclasses.replace(text, **options), 12)

  batches = calibration()
  assert [len(batch["tokens"]) for batch in batches] == [8, 4]
  whole = np.concatenate([batch["tokens"] for batch in batches])
  other = calibration(batch_size=16, section=dataclasses.replace(text.section, readers=8))
  np.testing.assert_array_equal(whole, other[0]["tokens"])
  if reader == "shards":
    stream = text.dataset.stream("train")
    tokens = stream.read(0, len(stream)).tobytes()
    assert all(row.astype(stream.dtype).tobytes() in tokens for row in whole)


def harness(run, content="these questions"):
  """A stand-in for the module harness."""

  def load(names, folders, **options):
    return [types.SimpleNamespace(name=name, content=content) for name in names]

  def ask(model, tasks):
    counts = {"split": "test", "scored": 3, "left_out": 1, "truncated": 0}
    left_out = [{"task": tasks[0].name, "example": 2, "reason": "a reason"}]
    return task_suite.Answers(model(tasks), {task.name: counts for task in tasks}, left_out)

  return types.SimpleNamespace(
    harness_model=lambda *model, **options: functools.partial(run, *model, **options),
    ask=ask,
    load_tasks=load,
  )


def test_tasks_are_added_to_cells_that_lack_them(measured, workdir, monkeypatch):
  """Nothing else is measured again."""
  _, evaluator, found = measured
  asked = []

  def run(model, params, tokenizer, tasks, *, context, mesh, prefix, bos):
    placed = {
      leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(params)
    }
    asked.append((placed, [task.name for task in tasks], context, prefix, bos))
    return {task.name: {"acc": 0.25, "acc_stderr": 0.1} for task in tasks}

  monkeypatch.setattr(task_suite, "_harness", lambda: harness(run))
  target = RunCheckpoints(workdir)

  said = []

  def make(tasks):
    cells, windows = evaluator.cells[:2], 12
    return Evaluator(target, cells, tasks=tasks, calibration_windows=windows, warn=said.append)

  with_tasks, others = make(["piqa"]), make(["arc_easy"])
  assert with_tasks.missing(2) == evaluator.cells[:2]
  params, cell = target.params(2), evaluator.cells[1]
  others.measure(2, params, cell)
  found_too = with_tasks.measure(2, params, cell)
  assert found_too["metrics"] == found["rtn"]["metrics"] and found_too["tasks"] == {
    "piqa": {"acc": 0.25, "acc_stderr": 0.1}
  }
  counts = {"split": "test", "scored": 3, "left_out": 1, "truncated": 0}
  assert found_too["examples"] == {"piqa": counts}
  assert said == [
    f"{task}: 1 of 4 examples left out of all metrics; of example 2, a reason"
    for task in ("arc_easy", "piqa")
  ]
  (file,) = (workdir / "eval").glob("2-*-piqa-*.json")
  assert json.loads(file.read_text())["left_out"] == [
    {"task": "piqa", "example": 2, "reason": "a reason"}
  ]
  assert (
    with_tasks.missing(2) == others.missing(2) == evaluator.cells[:1] and evaluator.missing(2) == []
  )
  assert asked == [
    ({True}, [task], 32, tokenizers.load("bytes").eot, False) for task in ("arc_easy", "piqa")
  ]
  assert "piqa/acc" in table.results_table([found_too]) and "stderr" not in table.results_table(
    [found_too]
  )
  monkeypatch.setattr(task_suite, "_harness", lambda: harness(run, "others of that name"))
  assert (
    make(["piqa"]).missing(2) == evaluator.cells[:2] and make(["piqa"]).results()[1]["tasks"] == {}
  )
  (both,) = (row for row in results.ResultStore(workdir / "eval").cells() if row["method"] == "rtn")
  assert both["tasks"].keys() == {"piqa", "arc_easy"}, (
    "jobs that ask different tasks lose nothing of each other's"
  )


def first_rows(batches, count):
  """The first rows of batches, however these are made."""
  rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
  return [{name: x[:count] for name, x in rows.items()}]


@pytest.mark.slow
def test_propagation_is_added_to_the_cells_that_quantize(workdir, quantized_workdir, tmp_path):
  """To cells of methods, and to a model trained quantized, as it was trained; once."""
  target = RunCheckpoints(workdir)
  cells = plan_cells(target, ["rtn_w4a4"], ["rtn"])
  evaluator = Evaluator(target, cells, tmp_path, propagation=True)
  params = target.params(2)
  plain, rounded = (evaluator.measure(2, params, cell) for cell in cells)
  assert "propagation" not in plain["tasks"] and not evaluator.missing(2)
  q = quant.ptq.quantize(target.model, params, quant.RECIPES["rtn_w4a4"])
  batches = list(runs.open(workdir).batches("validation"))
  batches = first_rows(batches, 8)
  value, error = propagation.final_error(target.model, params, q, batches)
  scores = rounded["tasks"]["propagation"]
  np.testing.assert_allclose((scores["R_L"], scores["R_L_stderr"]), (value, error), rtol=1e-4)
  found = propagation.final_error(target.model, params, q, batches, centre=True)
  said = [scores["R_L_centred"], scores["R_L_centred_stderr"]]
  np.testing.assert_allclose(said, found, rtol=1e-4)
  units = {unit["name"]: unit for unit in rounded["units"]}
  down = units["layers/0/mlp/down"]
  assert scores["inherited"] == down["A"] / down["R"] and 0 < scores["inherited"] < 1
  assert rounded["largest_gain"]["linear"] >= down["gain"]
  assert f"{scores['R_L']:.4f} ± {scores['R_L_stderr']:.4f}" in table.results_table([rounded])
  # Without it, or as before it, the cell is the one that was there.
  assert "units" not in Evaluator(target, cells, tmp_path).results([2])[1]

  target = RunCheckpoints(quantized_workdir)
  (cell,) = plan_cells(target, [], [])
  evaluator = Evaluator(target, [cell], tmp_path, propagation=True)
  result = evaluator.measure(2, target.params(2), cell)
  assert 0 < result["tasks"]["propagation"]["R_L"] < 1


def test_the_table_of_a_model_that_broke_has_empty_places(measured):
  """NaN and infinity are null in JSON, each by itself."""
  cell = measured[2]["rtn"]
  broken = {
    **cell["metrics"],
    "loss_difference": None,
    "loss_difference_interval": [0.5, None],
    "kl": None,
  }
  _, row = table.results_table([{**cell, "metrics": broken}]).splitlines()[:2]
  assert "…" not in row and f"{cell['metrics']['agreement']:.1%}" in row


def test_what_breaks_is_told_and_skipped_and_the_rest_is_measured(
  workdir, tmp_path, monkeypatch, capsys
):
  """A method that runs out of memory, and one of two tasks."""

  def run(model, params, tokenizer, tasks, **options):
    if tasks[0].name == "broken":
      raise FileNotFoundError("no such\nfile")
    return {tasks[0].name: {"acc": 0.25}}

  def quantize(*arguments, **options):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(task_suite, "_harness", lambda: harness(run))
  target = RunCheckpoints(workdir)
  cells = plan_cells(target, *PLAN)
  monkeypatch.setattr(quant.ptq, "quantize", quantize)
  evaluator = Evaluator(target, cells, tmp_path, tasks=["broken", "piqa"], calibration_windows=12)
  job = job_lib.Job(target, evaluator, job_lib.Progress())
  job.once([2])
  (cell,) = evaluator.results([2])
  assert cell["method"] == "none" and cell["tasks"] == {"piqa": {"acc": 0.25}}
  assert job.failed and evaluator.missing(2) == cells
  assert [reason.partition(":")[0] for reason in job.skipped[2]] == [
    "none, none",
    "rtn_w4a4, rtn",
    "rtn_w4a4, gptq",
  ]
  said = capsys.readouterr().err.splitlines()
  for line in (
    "step 2 · skipped: none, none: TaskError: broken: FileNotFoundError: no such file",
    "step 2 · skipped: rtn_w4a4, rtn: JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory",
  ):
    assert line in said


def test_a_run_that_was_trained_quantized_is_judged_as_trained(quantized_workdir):
  target = RunCheckpoints(quantized_workdir)
  cells = plan_cells(target, [], ["rtn"])
  assert cells == [Cell("quest_w4a4, head: rtn_w8a8", "none")], (
    "rules tell it from a run with another head"
  )
  evaluator = Evaluator(target, cells)
  cell = evaluator.measure(2, target.params(2), cells[0])
  (written,) = files(quantized_workdir, 2, "quest_w4a4", "none")
  assert json.loads(written.read_text())["recipe"] == cells[0].recipe and not evaluator.missing(2)
  recorded = runs.open(quantized_workdir).metrics().loc[2]
  np.testing.assert_allclose(cell["metrics"]["loss"], recorded["eval/loss"], rtol=1e-5)
  seen = {
    name: cell["metrics"][name]
    for name in recorded.index
    if name.startswith("outliers/") and name in cell["metrics"]
  }
  assert len(seen) == 6 * 4 and seen == pytest.approx(recorded[list(seen)].to_dict(), rel=1e-3), (
    "as its quantized layers see it"
  )
  assert cell["metrics"]["kl"] > 1e-4, "the reference is the same parameters in full precision"
  assert table.results_table([cell]).splitlines()[2:] == [table.OWN_REFERENCE]
  with pytest.raises(
    config.ConfigError,
    match=r"--recipes = 'rtn_w4a4': .*under 'quest_w4a4, head: rtn_w8a8'; leave --recipes",
  ):
    plan_cells(target, ["rtn_w4a4"], ["gptq"])


def test_contexts_begin_as_the_training_documents_did(workdir, quantized_workdir):
  """Whatever separates the documents that the run is evaluated on."""
  with_bos, without = tokenizers.load("bytes").bos, tokenizers.load("bytes").eot
  other = runs.open(workdir).dataset.directory
  for options in ({}, {"dataset": other}):
    target = RunCheckpoints(quantized_workdir, **options)
    assert (target.text.prefix, target.text.bos) == (with_bos, True)
  target = RunCheckpoints(workdir)
  assert (target.text.prefix, target.text.bos) == (without, False)


def test_what_a_recipe_cannot_do_is_said_before_any_checkpoint_is_read(workdir):
  target = RunCheckpoints(workdir)
  with pytest.raises(config.ConfigError, match="learned"):
    plan_cells(target, ["rtn_w4a4", "lsq_w4a4"], ["rtn"])
  with pytest.raises(config.ConfigError, match=r"attention/q.* 48"):
    plan_cells(target, ["rtn_w4a16_g128"], ["rtn"])
  with pytest.raises(
    config.ConfigError, match=r"--recipes = 'nvfp4' with --methods = 'rtn_mse': scale = 'mse'"
  ):
    plan_cells(target, ["nvfp4"], ["rtn", "rtn_mse"])


def test_documents_that_are_parted_otherwise_are_told(workdir, tiny_config, capsys):
  for separator in ("eot", "bos"):
    section = dataclasses.replace(tiny_config().data, separator=separator)
    dataset = data.prepare(section, log=lambda text: None).directory
    text = RunCheckpoints(workdir, dataset=dataset).text
    assert (text.prefix, text.bos) == (257, False), "as between training documents, whatever these"
    told = capsys.readouterr().err
    assert ("(separator=bos) than those that the run was trained on (separator=eot)" in told) == (
      separator == "bos"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validation-00000.bin", "train-00000.bin"])
def test_no_cell_of_damaged_data_is_kept(workdir, tmp_path, monkeypatch, name):
  """Even if only calibration read it. The dataset counts as too large to compare on opening."""
  dataset = pathlib.Path(runs.open(workdir).dataset.directory)
  shutil.copytree(dataset, tmp_path / "data")
  content = bytearray((tmp_path / "data" / name).read_bytes())
  content[-4] ^= 1
  (tmp_path / "data" / name).write_bytes(content)
  monkeypatch.setattr(sums, "AT_OPENING", 0)
  target = RunCheckpoints(workdir, dataset=str(tmp_path / "data"))
  target.text.dataset.sums.touch(name)  # as calibration does
  evaluator = Evaluator(target, plan_cells(target, [], []), tmp_path / "out")
  job = job_lib.Job(target, evaluator, job_lib.Progress())
  with pytest.raises(data.DataError, match=rf"{name}: contents are not those that were prepared"):
    job.newest()
  assert not list((tmp_path / "out").iterdir())


def test_following_tries_a_damaged_checkpoint_again_once_it_was_saved_anew(
  workdir, tmp_path, monkeypatch
):
  """Between the job's polls: nothing happens, other damage, the right checkpoint, the run's end."""
  shutil.copytree(workdir, tmp_path / "run")
  damaged = tmp_path / "run" / "checkpoints" / "2"
  later = itertools.count(int(os.stat(damaged).st_mtime) + 1)

  def save(keep):
    shutil.rmtree(damaged)
    shutil.copytree(workdir / "checkpoints" / "2", damaged)
    array = max((damaged / "state").rglob("*"), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:keep])
    os.utime(array, times=2 * (next(later),))

  save(keep=100)
  events = iter(
    [lambda: None, lambda: save(keep=200), lambda: save(keep=None), lambda: ended.append(True)]
  )
  clock = types.SimpleNamespace(
    sleep=lambda seconds: seconds == POLL and next(events)(), monotonic=float, perf_counter=float
  )
  monkeypatch.setattr(job_lib, "time", clock)

  target = RunCheckpoints(tmp_path / "run")
  read, measured, ended = [], [], []

  def params(step):
    read.append(step)
    return target.params(step)

  watched = RunCheckpoints(tmp_path / "run")
  monkeypatch.setattr(watched, "ended", lambda: bool(ended))
  monkeypatch.setattr(watched, "params", params)

  def measure(step, params, cell):
    measured.append(step)
    return {"metrics": {"loss": 1.0}}

  job = job_lib.Job(watched, measures_once(measured, measure), job_lib.Progress(), POLL)
  job.follow()
  assert read == [1, 2, 2, 2] and measured == [1, 2] and not job.skipped
  assert next(events, None) is None


def go_back(run, to=1):
  """As --from_step leaves a run of two checkpoints."""
  aside = run / f"aside-{to}-17"
  (aside / "checkpoints").mkdir(parents=True)
  if to < 2:
    (run / "checkpoints" / "2").rename(aside / "checkpoints" / "2")


def save(run, step):
  """Another checkpoint of a step."""
  shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
  shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / str(step))
  for path in (run / "checkpoints" / str(step)).rglob("*"):
    os.utime(path, times=2 * (os.stat(path).st_mtime + 100,))


def seal(run):
  (run / "checkpoints" / "2" / SUMS).write_text("{}")


# What becomes of checkpoint 2 while it is measured -> (how, whether it is gone).
MEANWHILE = {
  "nothing": ([], False),
  "it is sealed": ([seal], False),
  "the next is saved": ([lambda run: save(run, 3)], False),
  "it is half deleted, as others are kept": (
    [lambda run: save(run, 3), lambda run: shutil.rmtree(run / "checkpoints" / "2" / "state")],
    False,
  ),
  "it is deleted, as others are kept": (
    [lambda run: save(run, 3), lambda run: shutil.rmtree(run / "checkpoints" / "2")],
    False,
  ),
  "the run goes back to it": ([lambda run: go_back(run, 2)], False),
  "the run goes back to before it": ([go_back], True),
  "and saves it anew": ([go_back, lambda run: save(run, 2)], True),
  "and is past it, and has deleted it": ([go_back, lambda run: save(run, 3)], True),
  "it is set aside, as damaged": (
    [lambda run: (run / "checkpoints" / "2").rename(run / "checkpoints" / "damaged-2-17")],
    True,
  ),
  "and saved anew": ([lambda run: save(run, 2)], True),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_parameters_that_are_the_runs_no_longer_are_told(what, workdir, tmp_path, monkeypatch):
  """And those of a checkpoint that was deleted in its turn still are."""
  run, (events, gone) = tmp_path / "run", MEANWHILE[what]
  shutil.copytree(workdir, run)
  targets = [RunCheckpoints(run), OneCheckpoint(run / "checkpoints" / "2", average="last:2")]
  for target in targets:
    target.check_read(2)
    monkeypatch.setattr(target.run, "params", lambda step, average: {})
    target.params(2)
  for event in events:
    event(run)
  for target in targets:
    if gone:
      with pytest.raises(GoneError, match="went back to before it, or saved it anew"):
        target.check_read(2)
    else:
      target.check_read(2)
    target.params(1)
    target.check_read(2)  # of which no parameters are around


@pytest.mark.parametrize(
  "last, done",
  [("metrics", []), ("task", ["metrics"]), ("propagation", ["metrics", "task", "metrics"])],
)
def test_what_is_measured_of_a_checkpoint_that_is_gone_is_dropped(
  last, done, workdir, tmp_path, monkeypatch
):
  """It would pass for the result of the replacement, which would then not be measured."""
  run, measured = tmp_path / "run", []
  shutil.copytree(workdir, run, ignore=shutil.ignore_patterns("eval"))
  target = RunCheckpoints(run)
  evaluator = Evaluator(target, [Cell("none", "none"), Cell("rtn_w4a4", "rtn")], propagation=True)

  def measure(part, found):
    measured.append(part)
    if part == last and measured.count(last) == 1:
      go_back(run)
    return found

  def metrics(cell, params, q):
    return measure("metrics", {"loss": 1.0})

  scores = {"scores": {}, "seconds": 1.0}
  metrics.decompose_error = lambda params, q: measure("propagation", scores)
  task = types.SimpleNamespace(name="piqa", content="of it")
  suite = types.SimpleNamespace(
    tasks=[task], asked_of=lambda model, params: lambda task: measure("task", scores)
  )
  q = types.SimpleNamespace(model=None, params={}, size_bytes=1, fallbacks=())
  monkeypatch.setattr(target.run, "params", lambda step, average: {})
  monkeypatch.setattr(evaluator, "_metrics", metrics)
  monkeypatch.setattr(evaluator, "_suite", suite)
  monkeypatch.setattr(
    evaluator, "_quantize", lambda params, cell: q if cell.method == "rtn" else None
  )
  job = job_lib.Job(target, evaluator, job_lib.Progress())
  assert job.newest() == [1] and job.failed
  assert measured[: len(done) + 1] == [*done, last], "and no other part is measured"
  assert len([path for path in (run / "eval").iterdir() if path.name[0] == "2"]) == len(done)
  (reason,) = job.skipped[2]
  assert reason.endswith("while it was measured: the result is dropped")
  save(run, 2)
  job.once([2])
  assert not job.skipped and not evaluator.missing(2) and job.evaluated == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("follow", [False, True])
def test_another_training_in_the_runs_folder_ends_the_job(
  follow, workdir, quantized_workdir, tmp_path
):
  """Instead of its checkpoints being measured as the first one's: it begins while step 1 is."""
  folder, measured = tmp_path / "run", []
  shutil.copytree(workdir, folder)
  target = RunCheckpoints(folder)

  def measure(step, params, cell):
    measured.append(step)
    shutil.rmtree(folder)
    shutil.copytree(quantized_workdir, folder)
    return {"metrics": {"loss": 1.0}}

  job = job_lib.Job(target, measures_once(measured, measure), job_lib.Progress(), POLL)
  with pytest.raises(WorkdirError, match=r"run holds another training \([0-9a-f]{12}\) than when"):
    job.follow() if follow else job.once([1, 2])
  assert measured == [1]


def test_a_result_that_cannot_be_written_ends_the_job():
  """On a full disk, for instance, what is measured next would be lost, too."""
  cells, measured = [Cell("none", "none"), Cell("rtn_w4a4", "rtn")], []

  def measure(step, params, cell):
    measured.append(cell)
    raise results.WriteError("no space")

  target = types.SimpleNamespace(params=lambda step: {})
  evaluator = types.SimpleNamespace(
    make_folder=lambda: None, missing=lambda step: cells, measure=measure
  )
  with pytest.raises(results.WriteError):
    job_lib.Job(target, evaluator, job_lib.Progress()).once([1])
  assert measured == cells[:1]


def test_the_newest_step_gives_way_to_the_one_before_it_and_fails():
  """It was the one that was asked for."""

  def params(step):
    if step == 9:
      raise CheckpointError("checkpoints/9 could not be read now")
    return {}

  for steps, found in (([1, 2], 2), ([1, 2, 9], 2), ([9], None)):
    target = types.SimpleNamespace(
      params=params, steps=functools.partial(list, steps), check=lambda: None
    )
    evaluator = types.SimpleNamespace(
      make_folder=lambda: None,
      missing=lambda step: [Cell("none", "none")],
      measure=lambda *arguments: {"metrics": {"loss": 1.0}},
    )
    job = job_lib.Job(target, evaluator, job_lib.Progress())
    assert job.newest() == ([found] if found else [])
    assert (job.failed, [*job.skipped]) == (steps == [1, 2, 9], [9] if 9 in steps else [])


def test_following_ends_once_the_steps_that_are_wanted_are_done():
  """Whatever happens to the run: one of them exists, one was evaluated before and is gone, and one
  comes later."""
  there, measured = [1, 2], {5}
  target = types.SimpleNamespace(
    steps=lambda: list(there),
    ended=lambda: False,
    written=lambda step: None,
    params=lambda step: {},
    status=lambda: "running from step 0",
    last_write=lambda: len(there),
    check=lambda: None,
  )

  def measure(step, params, cell):
    measured.add(step)
    there.append(9)
    return {"metrics": {"loss": 1.0}}

  job = job_lib.Job(target, measures_once(measured, measure), job_lib.Progress(), POLL)
  job.follow([1, 5, 9])
  job.check_results([1, 5, 9])
  assert measured == {1, 5, 9} and not job.failed and not job.skipped
  measured.remove(9)
  job.check_results([1, 5, 9, 12])
  gone = "none, none: its result has been removed since it was written"
  assert job.failed and job.skipped == {9: [gone], 12: ["there was no such checkpoint"]}


def test_processes_that_follow_a_run_take_it_for_dead_together(tmp_path, monkeypatch):
  """By the first one's clock and view of the lock: a process that ended alone would leave the
  others waiting."""
  now, first, told = [0.0], [], []
  monkeypatch.setattr(job_lib, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  monkeypatch.setattr(job_lib.mesh_lib, "found_by_first", lambda find: first.pop(0))
  origin = {"workdir": str(tmp_path), "config": {"log": {"watchdog_seconds": 0}}}
  target = types.SimpleNamespace(
    status=lambda: "running from step 1", last_write=lambda: "now", origin=origin
  )
  watch = job_lib.Watch(target, types.SimpleNamespace(line=told.append))

  def look(silent, *abandoned):
    first[:] = [silent, *abandoned]
    watch.look()
    assert not first, "it went another way than the first"
    return watch.dead

  look(0.0)
  now[0] = 9 * job_lib.SILENCE
  assert not look(1.0), "so long only by this one's clock"
  look(2 * job_lib.SILENCE)
  assert not look(2 * job_lib.SILENCE, False), "whose lock is held"
  assert look(2 * job_lib.SILENCE, True) and len(told) == 3


def test_following_tells_what_becomes_of_the_run(workdir, tmp_path, monkeypatch):
  shutil.copytree(workdir, tmp_path / "run")
  status, now, told = workdir_lib.Workdir(tmp_path / "run").set_status, [0.0], []
  target = RunCheckpoints(tmp_path / "run")
  monkeypatch.setattr(job_lib, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  watch = job_lib.Watch(target, types.SimpleNamespace(line=told.append))

  def look(after=job_lib.SILENCE / 2):
    now[0] += after
    watch.look()
    return told.pop() if told else None

  status("running", 1)
  assert look() == "run: running from step 1" and look() is None
  later = {**workdir_lib.Workdir(tmp_path / "run").read("status.json"), "time": "later"}
  workdir_lib.Workdir(tmp_path / "run").write("status.json", later)
  assert look() is None and look() is None and look() is None, "its heart beat"
  assert (
    look(1.0).startswith(
      "run: running from step 1, but silent for 30 minutes; if it was killed, resume"
    )
    and look() is None
  )
  hour = config.to_dict(target.run.config)["log"]["watchdog_seconds"]
  with workdir_lib.Workdir(tmp_path / "run").lock():
    assert look(1.5 * hour) is None and not watch.dead, "it may take long for a step"
  assert look(0).startswith("run: dead, as no process holds its lock") and watch.dead
  status("preempted", 2, "asked to stop")
  assert look() == "run: preempted at step 2: asked to stop" and not target.ended()
  status("running", 2)
  assert look() == "run: running from step 2"
  status("failed", 2, "OSError: disk full")
  assert look() == "run: failed at step 2: OSError: disk full" and target.ended()


@pytest.mark.slow
def test_a_hugging_face_directory(workdir, tiny_config, tmp_path):
  c = config.Model(
    **{
      **config.to_dict(runs.open(workdir).config)["model"],
      "mlp": "swiglu",
      "qk_norm": "rms",
      "attention_scale": "rsqrt",
      "rope_layout": "half",
      "tied": False,
    }
  )
  model = transformer.Transformer(c)
  params = jax.jit(lambda: jax.tree.map(lambda x: 3 * x, transformer.init(model, 0)))()
  hf.save(model, params, tmp_path)
  prepared = runs.open(workdir).dataset.directory
  target = HuggingFaceModel(str(tmp_path), dataset=prepared, context=32, documents=1)
  assert not target.text.bos, "there is no tokenizer that would say so"
  described = (tmp_path / "config.json").read_text()
  (tmp_path / SUMS).unlink()  # it is changed on purpose
  (tmp_path / "config.json").write_text(json.dumps({**json.loads(described), "rms_norm_eps": 1e-3}))
  other = HuggingFaceModel(str(tmp_path), dataset=prepared)
  assert other.identity != target.identity, "the same parameters, another model"
  (tmp_path / "config.json").write_text(described)
  evaluator = Evaluator(target, plan_cells(target, ["rtn_w8a8"], ["rtn"]))
  as_it_is, rounded = (
    evaluator.measure(0, target.params(0), cell)["metrics"] for cell in evaluator.cells
  )
  ids = target.text.dataset.stream("validation").document(0)
  losses = []
  apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
  for start in range(0, len(ids) - 1, 32):
    window = ids[start : start + 33].astype(np.int32)
    padded = np.pad(window[:-1], (0, 33 - len(window)))[None]
    logits = np.asarray(apply(padded), np.float64)[0, : len(window) - 1]
    losses += (
      np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(window) - 1), window[1:]]
    ).tolist()
  np.testing.assert_allclose(as_it_is["loss"], np.mean(losses), rtol=1e-5)
  assert as_it_is["tokens"] == len(losses) and rounded["kl"] < 1e-2
  assert len(files(tmp_path, 0, "rtn_w8a8", "rtn")) == 1

  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = library.Tokenizer(
    library.models.BPE({token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}, [])
  )
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.post_processor = library.processors.TemplateProcessing(
    "<s> $A", "<s> $A $B", [("<s>", 256)]
  )
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  own = data.prepare(
    tiny_config(**{"data.tokenizer": f"huggingface:{tmp_path}/tokenizer.json"}).data,
    log=lambda text: None,
  )
  target = HuggingFaceModel(str(tmp_path), dataset=own.directory)
  assert (target.text.prefix, target.text.bos) == (256, True), (
    "the tokenizer decides, whatever parts the documents of the dataset"
  )


def save_llama(vocab, directory, **arguments):
  """A Llama model of zeros as a Hugging Face directory."""
  sizes = {"blocks": 1, "heads": 1, "kv_heads": 1, "d_head": 2, "d_model": 2, "mlp_hidden": 2}
  c = dataclasses.replace(small_models.MODELS["llama"], vocab=vocab, **sizes)
  model = transformer.Transformer(c)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), transformer.shapes(model))
  hf.save(model, params, directory, **arguments)


@pytest.mark.parametrize(
  ("positions", "window", "longest"), [(256, 256, 256), (4096, 1024, 4096), (None, 1024, 2048)]
)
def test_windows_stay_within_a_hugging_face_models_positions(
  positions, window, longest, tiny_config, tmp_path
):
  dataset = data.prepare(tiny_config().data, log=lambda text: None)
  save_llama(dataset.tokenizer.vocab_size, tmp_path / "m", context=positions)

  def context(**options):
    return HuggingFaceModel(str(tmp_path / "m"), dataset=dataset.directory, **options).text.context

  assert (context(), context(context=longest)) == (window, longest)
  with pytest.raises(
    config.ConfigError,
    match=f"--hf = '.*m': --context = {longest + 1}: max_position_embeddings of config.json is "
    f"{longest}; give",
  ):
    context(context=longest + 1)


# what is wrong -> (arguments, what the one line on stderr holds); {run}, {quantized}, {empty},
# {other} are folders
REFUSED = {
  "nothing": ([], ["--workdir, --hf, --checkpoint"]),
  "two sources": (
    ["--workdir={run}", "--hf={run}"],
    ["expected one of --workdir, --hf, --checkpoint"],
  ),
  "a list given twice": (
    ["--workdir={run}", "--recipes=rtn_w4a4", "--recipes=rtn_w8a8"],
    ["--recipes is given 2 times: give it once"],
  ),
  "no run": (["--workdir={empty}"], ["holds no run"]),
  "no checkpoints": (["--workdir={bare}"], ["bare: no checkpoint", "--follow"]),
  "a recipe": (
    ["--workdir={run}", "--recipes=rtn_w4a5"],
    ["--recipes = 'rtn_w4a5'", "did you mean 'rtn_w4a"],
  ),
  "a recipe that is not one": (
    ["--workdir={run}", "--recipes=nope"],
    ["--recipes = 'nope'", "unknown recipe; expected one of rtn_w8a8"],
  ),
  "more calibration than there is": (
    ["--workdir={run}", "--recipes=rtn_w4a4", "--methods=gptq", "--calibration=100000000"],
    ["--calibration = 100000000", "windows of 32 tokens; give at most that"],
  ),
  "windows far beyond the run's": (
    ["--workdir={run}", "--context=9999999"],
    ["--context = 9999999", "was trained on windows of 32 tokens; give at most 512"],
  ),
  "no number of seconds": (["--workdir={run}", "--poll=nan"], ["--poll", "0.01 to 86400 seconds"]),
  "seconds before now": (["--workdir={run}", "--poll=-1"], ["--poll", "0.01 to 86400 seconds"]),
  "seconds without end": (["--workdir={run}", "--poll=inf"], ["--poll", "0.01 to 86400 seconds"]),
  "a method": (
    ["--workdir={run}", "--recipes=rtn_w4a4", "--methods=gtpq"],
    ["--methods = 'gtpq'", "did you mean 'gptq'"],
  ),
  "a method without a recipe": (
    ["--workdir={run}", "--methods=gptq"],
    ["--methods = 'gptq'", "--recipes"],
  ),
  "a step": (["--workdir={run}", "--steps=2,3"], ["--steps = '3'", "[1, 2]"]),
  "no step": (["--workdir={run}", "--steps=last"], ["--steps = 'last'", "100,200"]),
  "a folder that is no checkpoint": (
    ["--checkpoint={run}"],
    ["--checkpoint = ", "RUN/checkpoints/N"],
  ),
  "full precision wanted": (
    ["--workdir={quantized}", "--recipes=rtn_w4a4"],
    ["under 'quest_w4a4, head: rtn", "precision twin"],
  ),
  "another tokenizer": (
    ["--workdir={run}", "--data={other}"],
    ["--data = ", "tokenizer", "the run was trained with"],
  ),
  "no manifest": (["--workdir={begun}"], ["begun has no manifest.json", "start it again"]),
  "a torn manifest": (["--workdir={torn}"], ["torn/manifest.json: is not the JSON", "restore it"]),
  "a file for the results": (
    ["--workdir={run}", "--documents=1", "--out={begun}/config.json"],
    ["begun/config.json: File exists", "--out"],
  ),
  "an object store": (
    ["--workdir=az://bucket/run", "--follow"],
    ["az://bucket/run", "expected a folder, or s3:"],
  ),
  "no dataset": (["--hf={run}"], ["--data = ", "tokenizer.json"]),
  "no Hugging Face directory": (["--hf={empty}", "--data={own}"], ["--hf = ", "config.json"]),
  "windows longer than the model's": (
    ["--hf={llama}", "--data={own}", "--context=65"],
    ["--context = 65", "max_position_embeddings of config.json is 64"],
  ),
  "a torn config.json": (
    ["--hf={torn_hf}", "--data={own}"],
    ["torn_hf/config.json: is not the JSON that was written"],
  ),
}


@pytest.fixture(scope="module")
def told(workdir, quantized_workdir, tiny_config, corpus, tmp_path_factory):
  folder = tmp_path_factory.mktemp("refused")
  (folder / "empty").mkdir()
  (folder / "bare").mkdir()
  for name in ("config.json", "manifest.json", "status.json"):
    shutil.copy(workdir / name, folder / "bare")
  shutil.copytree(folder / "bare", folder / "begun", ignore=shutil.ignore_patterns("manifest.json"))
  shutil.copytree(folder / "bare", folder / "torn")
  (folder / "torn" / "manifest.json").write_text('{"id": ')
  pieces = tiny_config(**{"data.tokenizer": "sentencepiece", "data.vocab": 300}).data
  folders = {
    "run": workdir,
    "quantized": quantized_workdir,
    "empty": folder / "empty",
    "llama": folder / "llama",
    "torn": folder / "torn",
    "bare": folder / "bare",
    "begun": folder / "begun",
    "torn_hf": folder / "torn_hf",
    "other": data.prepare(pieces, log=lambda text: None).directory,
    "own": runs.open(workdir).dataset.directory,
  }
  save_llama(300, folder / "llama", context=64)
  (folder / "torn_hf").mkdir()
  (folder / "torn_hf" / "config.json").write_text('{"model_type": ')
  given = [
    [argument.format(**folders) for argument in arguments] for arguments, _ in REFUSED.values()
  ]
  offline_tasks.write_task(folder / "tasks", "endless", [{"context": "x", "word": "y"}])
  with open(folder / "tasks" / "endless.yaml", "a") as file:
    file.write(
      "output_type: generate_until\ngeneration_kwargs: {until: [], max_gen_toks: 1000}\n"
      "metric_list: [{metric: exact_match}]\n"
    )
  fails = [
    f"--workdir={workdir}",
    f"--out={folder}",
    "--documents=1",
    f"--task_folders={folder}/tasks",
    "--tasks=endless",
  ]
  return dict(
    zip(
      [*REFUSED, "a task"], commands.answers("evaluate.__main__", [*given, fails])[0], strict=True
    )
  )


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_and_exit_code_2(told, what):
  code, errors = told[what]
  assert code == 2, errors
  *_, line = errors.splitlines()
  assert line.startswith("error: ")
  assert all(part in line for part in REFUSED[what][1]), line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_stopped_says_so_in_one_line(number, tmp_path):
  job = subprocess.Popen(
    [sys.executable, "-m", "beyond_outliers.evaluate", f"--workdir={tmp_path}/run", "--follow"],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert job.stderr.readline() == f"waiting for a run in {tmp_path}/run\n"
  job.send_signal(number)
  _, said = job.communicate(timeout=60)
  assert said == "asked to stop; what was measured is kept, and the same command resumes\n"
  assert job.returncode == 128 + number


def test_what_could_not_be_measured_makes_the_exit_code_1(told):
  pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
  code, said = told["a task"]
  assert code == 1, said
  *_, row, skipped = said.splitlines()
  assert row.startswith("2     none") and skipped.startswith("step 2 skipped: ")
  assert "max_gen_toks = 1000: expected 1 to 31" in skipped
