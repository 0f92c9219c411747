"""What a run left opens again: its parts, on one device from eight, and not without a word where
there is no run."""

import jax
import numpy as np
import pytest

from beyond_outliers import checkpoint, config, mesh, runs, train
from beyond_outliers import workdir as workdir_lib
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


def test_records_without_a_recipe_still_open(workdir):
  run = runs.open(workdir)
  recorded = {key: value for key, value in config.to_dict(run.config).items() if key != "quant"}
  assert config.resolve(recorded) == run.config


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
