"""Comparison of commits (.ci/same.py): names are no difference, numbers are."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers import optim


@pytest.fixture
def same(monkeypatch):
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / ".ci"))
  return importlib.import_module("same")


@pytest.fixture
def program(same):
  """program(name, factor) -> the text of a program with a loop, normalized."""

  def of(name, factor):
    def body(x):
      return jnp.sin(x @ x) * factor

    def whole(x):
      table = np.arange(4096.0).reshape(64, 64) * factor
      return jax.lax.fori_loop(0, 3, lambda i, y: jax.jit(body)(y), x) + table

    body.__name__, whole.__name__ = name, f"{name}_whole"
    text = jax.jit(whole).lower(jnp.ones((64, 64))).compile().as_text()
    return same.tiny_runs.normalized(text)

  return of


def test_a_program_with_other_names_is_the_same(program):
  first = program("first", 2.0)
  assert first == program("second", 2.0) and first.count("\n") > 20
  assert "first" not in first and "metadata" not in first and "test_same" not in first


def test_another_constant_is_another_program(same, program):
  a, b = program("first", 2.0), program("first", 3.0)
  found = same.differences("hlo", [("step", a)], [("step", b)])
  assert len(found) == 3 and found[0].startswith("step | step, from line ")
  assert same.differences("hlo", [("step", a)], [("other", a)]) == []
  assert same.differences("hlo", [("step", a)], [("step", a)] * 2) == ["step: a program only in B"]


def test_arrays_differ_by_path_type_and_bits(same):
  a = {"x": np.float32([1, 2]), "y": np.float32([0.0])}
  assert same.differences("arrays", a, dict(a)) == []
  assert same.differences("arrays", a, {**a, "x": np.float32([1, 2.5])}) == [
    "x: largest |difference| 0.5"
  ]
  assert same.differences("arrays", a, {**a, "y": np.float32([-0.0])}) == [
    "y: largest |difference| 0"
  ]
  assert same.differences("arrays", a, {"x": a["x"].astype(np.float64), "z": a["y"]}) == [
    "y: only in A",
    "z: only in B",
    "x: float32[2] | float64[2]",
  ]


def test_numbers_differ_by_name(same):
  a, b = {"row 0, step 1, loss": 2.0}, {"row 0, step 1, loss": 2.5}
  assert same.differences("metrics", a, b) == ["row 0, step 1, loss: 2.0 | 2.5"]


def test_every_optimizer_is_compared(same):
  assert set(same.tiny_runs.optimizers_of(".")) == set(optim.OPTIMIZERS)


def test_runs_have_names_of_their_own(same):
  runs = same.tiny_runs.plan(same.tiny_runs.optimizers_of("."), quick=False)
  assert len({run.name for run in runs}) == len(runs) == len(optim.OPTIMIZERS) * 2 * 2 + 1
  quick = same.tiny_runs.plan(["soap"], quick=True)
  assert [run.name for run in quick] == ["soap_qat-1", "soap-1"]
