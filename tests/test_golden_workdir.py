"""Golden workdir of version 0.1: its runs, evaluations and quantized models are read as ever.

How it was made stands in golden/workdir_0_1/README.md.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from beyond_outliers import checkpoint, quant, runs

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "workdir_0_1"
LAST = slice(-8, None)  # positions whose logits were kept


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A copy, and the current folder: the runs name their dataset relative to that."""
  shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
  (tmp_path / "prepared").rename(tmp_path / "datasets")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture(scope="module")
def expected():
  with np.load(GOLDEN / "expected.npz") as file:
    return dict(file)


def command(folder, module, *arguments):
  """(stdout, stderr) of a command of today's code, on one device, compiled as for users."""
  plain = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  process = subprocess.run(
    [sys.executable, "-m", f"beyond_outliers.{module}", *arguments],
    cwd=folder,
    env={**os.environ, **plain, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout, process.stderr


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def contents(directory):
  return {
    str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in directory.rglob("*")
    if path.is_file()
  }


def check_sums(tree, name):
  """Paths, dtypes, shapes and sums are those that were written."""
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  sums = json.loads((GOLDEN / "sums.json").read_text())[name]
  assert {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in found.items()} == {
    path: [dtype, shape] for path, (dtype, shape, _) in sums.items()
  }
  for path, (_, _, total) in sums.items():
    assert np.asarray(found[path], np.float64).sum() == pytest.approx(total, rel=1e-12), path


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
  ("name", "optimizer", "recipe", "step"),
  [("adamw", "adamw", "none", 4), ("shampoo_qat", "shampoo", "quest_w4a4", 2)],
)
def test_a_run_is_opened(folder, expected, name, optimizer, recipe, step):
  run = runs.open(folder / name)
  c = run.config
  assert (c.optimizer.default.name, c.quant.recipe, c.steps) == (optimizer, recipe, 4)
  assert run.steps == [step]
  assert run.status == json.loads((GOLDEN / name / "status.json").read_text())
  losses = [
    row["train/loss"] for row in rows(GOLDEN / name / "metrics.jsonl") if "train/loss" in row
  ]
  assert list(run.metrics()["train/loss"].dropna()) == losses
  tokens = next(iter(run.batches("validation")))["tokens"][:1]
  np.testing.assert_array_equal(tokens, expected["tokens"])
  params = run.params()
  check_sums(params, name)
  logits = np.asarray(run.model.apply({"params": params}, expected["tokens"]))[:, LAST]
  # In 4 bits another version of XLA rounds a few activations to the next code, which moves the
  # logits as much as parameters that differ by 2e-7 do: by 0.09.
  written_by = jax.__version__.startswith("0.10.")
  atol = 1e-5 if recipe == "none" or written_by else 0.2
  np.testing.assert_allclose(logits, expected[f"{name}/logits"], atol=atol)


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoint(folder):
  """Saved on four devices, resumed on one: blocks of optimizer state lose their padding alone."""
  manifest = json.loads((folder / "shampoo_qat" / "manifest.json").read_text())
  (config,) = (word for word in manifest["command"] if word.startswith("--config="))
  config = config.replace("--config=code/", f"--config={ROOT}/")
  config = config.replace("mesh.data=2,mesh.fsdp=2", "mesh.data=1")
  _, said = command(folder, "main", config, "--workdir=shampoo_qat")
  assert "resuming from step 2 of 4" in said
  run = runs.open("shampoo_qat")
  assert run.steps == [2, 4] and run.status["status"] == "done"
  assert len(run.manifest["resumed"]) == 1 and (
    {key: run.manifest[key] for key in manifest} == {**manifest, "resumed": run.manifest["resumed"]}
  )
  tolerances = {
    "train/loss": 5e-4,
    "eval/loss": 5e-4,
    "update_norm": 5e-3,
    "parameter_norm": 5e-4,
    "roots/kept": 0,
    "roots/age": 0,
    "lr/hidden": 1e-6,
    "lr/embedding": 1e-6,
  }
  found, kept = rows(run.path / "metrics.jsonl"), rows(GOLDEN / "resumed.jsonl")
  for now, then in zip(found, kept, strict=True):
    assert now["step"] == then["step"] and now.keys() == then.keys()
    for name in tolerances.keys() & then.keys():
      expected = pytest.approx(then[name], rel=tolerances[name], abs=0)
      assert now[name] == expected, (now["step"], name)


def test_what_was_evaluated_is_not_measured_again(folder):
  before = contents(folder / "adamw")
  table, _ = command(
    folder,
    "evaluate",
    "--workdir=adamw",
    "--recipes=rtn_w4a4",
    "--methods=rtn,gptq",
    "--calibration=8",
  )
  assert table == (GOLDEN / "table.txt").read_text()
  assert contents(folder / "adamw") == before


@pytest.mark.parametrize(
  ("name", "load"), [("gptq", quant.load), ("smoothquant", checkpoint.load_quantized)]
)
def test_a_quantized_model_is_read_bit_by_bit(folder, expected, name, load):
  q = load(folder / f"quantized_{name}")
  assert q.method == name
  check_sums(q.params, name)
  codes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(q.params)
    if leaf.dtype == np.int8
  }
  kept = {key.removeprefix(f"{name}/") for key in expected if key.startswith(f"{name}/layers")}
  assert codes.keys() == kept and len(kept) == 6
  for path, array in codes.items():
    np.testing.assert_array_equal(array, expected[f"{name}/{path}"], err_msg=path)
  logits = np.asarray(q.model.apply({"params": q.params}, expected["tokens"]))[:, LAST]
  np.testing.assert_allclose(logits, expected[f"{name}/logits"], atol=1e-5)
