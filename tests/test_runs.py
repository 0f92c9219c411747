"""What a run left opens again: its parts, on one device from eight, and not without a word where
there is no run."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest

from beyond_outliers import checkpoint, config, data, mesh, runs, train
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.errors import DataError
from beyond_outliers.evaluate import steps
from beyond_outliers.model.forward import make_forward
from beyond_outliers.train import program as program_lib


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
  """A run on eight devices."""
  path = tmp_path_factory.mktemp("runs") / "inner" / "eight"
  c = tiny_config(
    **{"mesh.fsdp": 2, "mesh.model": 2, "steps": 4, "checkpoint.every": 2, "eval.every": 2}
  )
  assert train.run(c, path, say=lambda text: None) == "done"
  return path


@pytest.mark.slow
def test_the_model_is_the_one_that_was_trained(tiny_config, tmp_path):
  """Under its recipe, with the scales that it learned."""
  c = tiny_config(**{"quant.recipe": "lsq_w4a4", "steps": 1, "model.blocks": 1})
  train.run(c, tmp_path, say=lambda text: None)
  run = runs.open(tmp_path)
  tokens = next(run.batches("validation"))["tokens"]
  program = program_lib.build_program(c)
  with mesh.use(program.mesh):
    _, state, _, _ = checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True).restore(
      program.state, 1
    )
  expected = jax.jit(program.model.apply)({"params": jax.device_get(state.params)}, tokens)
  np.testing.assert_allclose(
    jax.jit(run.model.apply)({"params": run.params()}, tokens), expected, rtol=0, atol=1e-5
  )


def test_records_without_younger_sections_still_open(workdir):
  run = runs.open(workdir)
  younger = ("quant", "average")
  recorded = {k: value for k, value in config.to_dict(run.config).items() if k not in younger}
  assert config.resolve(recorded) == run.config


@pytest.mark.parametrize("average", ["", "last:2"])
def test_checkpoints_of_another_training_are_refused(workdir, tmp_path, average):
  """One that began in the folder since it was opened, or whose manifest or checkpoints are not its
  own; of an earlier version, whose checkpoints do not say whose they are, all open."""
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  mine, manifest = runs.open(folder), workdir_lib.Workdir(folder).read("manifest.json")
  first, _ = mine.identity, mine.params(average=average)
  workdir_lib.Workdir(folder).write("manifest.json", {**manifest, "id": "another"})
  other = runs.open(folder)
  assert mine.identity == first != other.identity and not other.replaced_by()
  assert mine.replaced_by() == other.identity
  told = rf"4 belongs to the run {first[:12]}, and .* belonged to {other.identity[:12]} when it"
  with pytest.raises(checkpoint.CheckpointError, match=told):
    other.params(average=average)
  for step in ("2", "4"):
    shutil.rmtree(folder / "checkpoints" / step / "run")
    (folder / "checkpoints" / step / "sha256.json").unlink()
  other.params(average=average)


@pytest.mark.parametrize(
  ("name", "problem"),
  [
    ("ema", r"average = 'ema': .* kept no moving average \(average.decay = 0\)"),
    ("last", r"average = 'last': the mean of how many checkpoints\? .*give 'last:COUNT'"),
    ("last:0", "average = 'last:0': expected 'ema', 'last' or 'last:COUNT'"),
    ("mean", "average = 'mean': expected 'ema'"),
  ],
)
def test_an_average_that_a_run_does_not_have_is_refused(workdir, name, problem):
  with pytest.raises(config.ConfigError, match=problem):
    runs.open(workdir).params(average=name)


def test_an_average_of_the_last_checkpoints_is_their_mean(workdir):
  """Of any run; fewer where there are not so many."""
  run = runs.open(workdir)
  found = run.params(average="last:3")
  for x, two, four in zip(
    *map(jax.tree.leaves, (found, run.params(2), run.params(4))), strict=True
  ):
    np.testing.assert_array_equal(x, (two + four) / 2)
  assert runs.AverageOfRun(run, "last:3").steps(4) == [2, 4]
  assert runs.AverageOfRun(run, "last:3").steps(2) == [2]


@pytest.mark.parametrize("name, steps", [("last:3", [2, 4]), ("last:1", [4])])
def test_an_average_tells_what_it_was_made_of_though_the_run_deletes_that(
  workdir, tmp_path, name, steps
):
  shutil.copytree(workdir, tmp_path / "run")
  average = runs.AverageOfRun(runs.open(tmp_path / "run"), name)
  one = mesh.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])
  average.restore(one, 4)
  for step in (2, 4):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
  assert average.steps(4) == steps


def test_open(workdir, tiny_config):
  run = runs.open(workdir)
  assert run.config == tiny_config(
    **{"mesh.fsdp": 2, "mesh.model": 2, "steps": 4, "checkpoint.every": 2, "eval.every": 2}
  )
  assert run.status["status"] == "done" and run.status["step"] == 4
  assert run.steps == [2, 4]
  # Documents end with this token.
  assert run.generation == {
    "context": 32,
    "bos_token_id": run.tokenizer.eot,
    "eos_token_id": run.tokenizer.eot,
  }
  assert (
    run.manifest["devices"]["count"] == 8 and run.manifest["packages"]["jax"] == jax.__version__
  )
  assert run.manifest["parameters"]["total"] == sum(x.size for x in jax.tree.leaves(run.params()))
  assert run.tokenizer.decode(run.tokenizer.encode("of the people")) == "of the people"
  frame = run.metrics()
  assert list(frame.index) == [1, 2, 3, 4]
  assert frame["eval/loss"].notna().tolist() == [False, True, False, True]
  assert {
    "train/loss",
    "gradient_norm",
    "parameter_norm",
    "update_norm",
    "lr/hidden",
    "tokens_per_second",
    "peak_share",
    "eval/bits_per_byte",
  } <= set(frame.columns)


def test_parameters_of_eight_devices_on_one(workdir):
  run = runs.open(workdir)
  program = program_lib.build_program(run.config)
  with mesh.use(program.mesh):
    _, state, _, _ = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True).restore(
      program.state, 2
    )
  params = run.params(2)
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
  assert {x.dtype for x in jax.tree.leaves(run.params(2, dtype="bfloat16"))} == {
    np.dtype("bfloat16")
  }
  for dtype in ("int8", "float64", "bfloat"):  # which would be zeros, float32, and nothing
    with pytest.raises(config.ConfigError, match=f"dtype = '{dtype}': (expected one of|JAX has)"):
      run.params(2, dtype=dtype)


def test_batches_and_the_recorded_loss_agree(workdir):
  """The model, parameters and validation batches that `runs` hands out give the loss that the run
  wrote down."""
  from beyond_outliers.evaluate import metrics

  run = runs.open(workdir)
  eval_step = jax.jit(steps.make_eval_step(make_forward(run.model, run.config.data.mask_documents)))
  params = run.params()
  got = metrics.evaluate(
    lambda batch: jax.tree.map(np.asarray, eval_step(params, dict(batch))),
    run.batches("validation"),
    run.dataset.bytes("validation"),
  )
  recorded = run.metrics()
  np.testing.assert_allclose(got["loss"], recorded["eval/loss"].iloc[-1], rtol=1e-6)
  np.testing.assert_allclose(
    got["bits_per_byte"], recorded["eval/bits_per_byte"].iloc[-1], rtol=1e-6
  )
  batch = next(run.batches("train"))
  assert batch["tokens"].shape == (8, 32)
  with pytest.raises(ValueError, match="split = 'test'"):
    run.batches("test")


def test_find(workdir, tmp_path):
  found = runs.find(workdir.parent.parent)
  assert [run.path.name for run in found] == ["eight"]
  assert "done at step 4 of 4" in repr(found[0])
  with pytest.raises(workdir_lib.WorkdirError, match="holds no run"):
    runs.open(tmp_path)


@pytest.fixture
def recorded(tiny_config, tmp_path, monkeypatch):
  """recorded(path) -> a workdir, project/runs/one, whose manifest holds this path of its dataset,
  which lies at project/datasets/NAME; and that name."""
  monkeypatch.chdir(tmp_path)
  c = tiny_config()
  made = data.prepare(dataclasses.replace(c.data, directory="project/datasets"), log=str)
  name = os.path.basename(made.directory)

  def record(path):
    folder = workdir_lib.Workdir("project/runs/one")
    folder.write("config.json", config.to_dict(c))
    known = {"fingerprint": made.fingerprint, "tokenizer": made.tokenizer.fingerprint}
    folder.write("manifest.json", {"time": "", "data": {"directory": path, **known}})
    return folder.path

  return record, name


@pytest.mark.parametrize(
  "path, opened_in",
  [
    ("project/datasets/{name}", "."),  # as it was trained
    ("datasets/{name}", "/"),  # trained in project, and opened elsewhere
    ("project/datasets/{name}", "/"),
    ("/former/project/datasets/{name}", "/"),  # moved with the run
    ("/former/{name}", "project/datasets"),
    ("../../datasets/{name}", "/"),  # trained in the workdir
  ],
)
def test_a_dataset_is_found_from_anywhere(recorded, monkeypatch, path, opened_in):
  record, name = recorded
  place, expected = record(path.format(name=name)), os.path.abspath(f"project/datasets/{name}")
  if "former/{name}" in path:  # beside the run
    shutil.move(f"project/datasets/{name}", f"project/runs/{name}")
    expected = os.path.abspath(f"project/runs/{name}")
  monkeypatch.chdir(opened_in)
  assert os.path.realpath(runs.open(place).dataset.directory) == expected


def test_another_dataset_of_the_same_name_is_not_taken(recorded, tiny_config):
  record, name = recorded
  place = record(f"/former/datasets/{name}")
  other = data.prepare(
    dataclasses.replace(tiny_config().data, validation="newest:5", directory="other"), log=str
  )
  shutil.rmtree(f"project/datasets/{name}")
  shutil.copytree(other.directory, f"project/datasets/{name}")
  with pytest.raises(DataError) as refused:
    _ = runs.open(place).dataset
  text = str(refused.value)
  assert "\n" not in text and f"/former/datasets/{name}" in text and "--data" in text
  assert f"project/datasets/{name} holds data {other.fingerprint[:12]}" in text
  with open(f"project/datasets/{name}/meta.json", "w") as file:
    file.write("{")
  with pytest.raises(DataError, match=r"the run was trained on data .*meta.json: is not the JSON"):
    _ = runs.open(place).dataset


def test_a_run_that_ended_before_it_began_can_be_told(recorded):
  record, _ = recorded
  place = record("nowhere")
  run = runs.open(place)
  assert run.status == {"status": "not started", "step": 0, "reason": ""}
  assert "not started at step 0" in repr(run) and run.steps == []
  with pytest.raises(workdir_lib.WorkdirError, match=r"has no metrics.jsonl; restore it"):
    run.metrics()
  (place / "manifest.json").write_text('{"time": "", "data": {"fingerprint": "x"}}')
  with pytest.raises(workdir_lib.WorkdirError, match=r"lacks data.directory, data.tokenizer;"):
    _ = run.trained_on
  (place / "manifest.json").unlink()
  with pytest.raises(workdir_lib.WorkdirError, match=r"no manifest.json: .*; start it again"):
    _ = runs.open(place).identity


def test_find_takes_each_run_once_by_its_own_name(recorded, tmp_path):
  record, _ = recorded
  record("nowhere")
  project = tmp_path / "project"
  (project / "a_link").symlink_to(project / "runs")
  (project / "runs" / "latest").symlink_to(project / "runs" / "one")
  (project / "round").symlink_to(project)
  (project / "itself").symlink_to("itself")
  shutil.copytree(project / "runs" / "one", project / "runs" / "backup~")
  found = [str(run.path) for run in runs.find(project)]
  assert found == [str(project / "runs" / name) for name in ("backup~", "one")]
  with pytest.raises(
    workdir_lib.WorkdirError, match=r"manifest.json: Not a directory; give folders"
  ):
    runs.find(project / "runs" / "one" / "manifest.json")


def test_find_takes_runs_in_the_folder_of_another_but_not_in_its_checkpoints(recorded):
  record, _ = recorded
  outer = record("nowhere")
  for name in ("later/two", "checkpoints/2/state", "aside-4-1/checkpoints"):
    shutil.copytree(outer, outer / name, ignore=shutil.ignore_patterns("later", "checkpoints"))
  assert [run.path for run in runs.find(outer)] == [outer, outer / "later/two"]
