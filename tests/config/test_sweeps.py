"""Sweeps: what they combine to, what they refuse, and that every run of a config's own sweep can be
made."""

import importlib
import pathlib

import pytest

from beyond_outliers import config
from beyond_outliers.config import sweeps
from configs import base

NAMES = sorted(
  path.stem
  for path in pathlib.Path(base.__file__).parent.glob("*.py")
  if path.stem not in ("__init__", "base")
)
A, B = sweeps.sweep("a.x", [1, 2]), sweeps.sweep("b.y", iter("pq"))


def test_sweeps_combine():
  assert sweeps.product([A, B]) == [
    {"a.x": 1, "b.y": "p"},
    {"a.x": 1, "b.y": "q"},
    {"a.x": 2, "b.y": "p"},
    {"a.x": 2, "b.y": "q"},
  ]
  assert sweeps.zipit([A, B]) == [{"a.x": 1, "b.y": "p"}, {"a.x": 2, "b.y": "q"}]
  assert sweeps.chainit([A, B]) == [{"a.x": 1}, {"a.x": 2}, {"b.y": "p"}, {"b.y": "q"}]
  assert sweeps.product([A, sweeps.fixed("seed", 3)]) == [
    {"a.x": 1, "seed": 3},
    {"a.x": 2, "seed": 3},
  ]
  assert sweeps.product([]) == [{}]


def test_what_is_combined_is_a_copy():
  sweeps.chainit([A])[0]["a.x"] = 9
  sweeps.product([A])[0]["a.x"] = 9
  assert A == [{"a.x": 1}, {"a.x": 2}]


def test_contradictions_are_refused():
  with pytest.raises(ValueError, match=r"lengths \[2, 1\]"):
    sweeps.zipit([A, sweeps.fixed("seed", 0)])
  for combine in (sweeps.product, sweeps.zipit):
    with pytest.raises(ValueError, match=r"'a.x' is set twice"):
      combine([A, A])


def test_names_of_runs_are_stable_and_fit_for_a_folder():
  overrides = {"optimizer.learning_rate": 1e-3, "seed": 0, "data.path": "/some where/*.txt"}
  backwards = dict(reversed(overrides.items()))
  assert (
    sweeps.run_name(overrides)
    == sweeps.run_name(backwards)
    == "path=_some_where_.txt,learning_rate=0.001,seed=0"
  )
  assert sweeps.run_name({"data.seed": 1, "seed": 2}) == "data.seed=1,seed=2", (
    "two keys must not share one short name"
  )
  assert sweeps.run_name({"seed": 1}) != sweeps.run_name({"seed": 11})
  assert sweeps.run_name({}) == "default"


@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_a_config_s_sweep_is_a_config(name):
  module = importlib.import_module(f"configs.{name}")
  runs = module.get_hyper(sweeps)
  assert len({sweeps.run_name(overrides) for overrides in runs}) == len(runs) > 1
  for overrides in runs:
    c = module.get_config(
      "nano," + ",".join(f"{key}={value!r}" for key, value in overrides.items())
    )
    flat = config.flatten(config.to_dict(config.resolve(c)))
    assert {key: flat[key] for key in overrides} == overrides
