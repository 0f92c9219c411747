"""Every optimizer's section: as the factory has it, in every config file, and refused when
wrong."""

import dataclasses
import inspect
import itertools
import json
import pathlib
import runpy

import pytest

from beyond_outliers import config, optim
from beyond_outliers.config import optimizers, sweeps
from beyond_outliers.optim import grafting, refresh
from beyond_outliers.optim.linalg import inverse_root, newton_schulz
from beyond_outliers.optim.muon import UPDATE_SCALES
from beyond_outliers.optim.psgd import NOISE
from beyond_outliers.optim.scion import NORMS

CONFIGS = sorted(
  path
  for path in (pathlib.Path(__file__).parents[2] / "configs").glob("[a-z]*.py")
  if path.stem != "base"
)


def get_config(name, arg=""):
  return runpy.run_path(str(CONFIGS[0].parent / f"{name}.py"))["get_config"](arg)


def test_every_optimizer_has_a_section_and_a_config_file():
  assert set(optimizers.OPTIMIZERS) == set(optim.OPTIMIZERS) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_section_has_only_arguments_of_the_factory(name):
  arguments = set(inspect.signature(optim.OPTIMIZERS[name]).parameters)
  fields = {field.name for field in dataclasses.fields(optimizers.OPTIMIZERS[name])} - {"name"}
  assert fields <= arguments
  assert arguments - fields <= {"axes", "mesh", "precision", "ns_eps"}, (
    "an argument that no config can set"
  )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", config.SIZES)
def test_every_config_resolves_at_every_size_and_survives_json(path, size):
  c = config.resolve(get_config(path.stem, size))
  assert config.resolve(json.loads(json.dumps(config.to_dict(c)))) == c
  assert list(c.optimizer.groups) == ["embedding", "scale", "vector", "hidden"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_sweep_has_five_rates_a_factor_of_root_ten_apart_around_the_chosen_one(path):
  sweep = runpy.run_path(str(path))["get_hyper"](sweeps)
  rates = sorted({run["optimizer.learning_rate"] for run in sweep})
  assert len(rates) >= 5
  for lower, higher in itertools.pairwise(rates):
    assert 2.9 < higher / lower < 3.4
  for size in ("nano", "0.3m"):  # those that were tuned
    assert get_config(path.stem, size).optimizer.learning_rate in rates[1:-1], size


def test_choices_are_those_of_the_tables():
  """The configuration cannot import the optimizers, so it lists their rows itself."""
  assert set(optimizers.ITERATION_TABLES) == set(newton_schulz.COEFFICIENTS)
  assert set(optimizers.ITERATION_DTYPES) == set(newton_schulz.DTYPES)
  for name, field, table in (
    ("muon", "scale", UPDATE_SCALES),
    ("scion", "norm", NORMS),
    ("psgd", "noise", NOISE),
    ("shampoo", "root", inverse_root.ROOTS),
    ("shampoo", "grafting", grafting.GRAFTS),
    ("shampoo", "refresh", refresh.REFRESHES),
  ):
    for row in table:
      resolved = config.resolve(config.override(get_config(name), {f"optimizer.{field}": row}))
      assert getattr(resolved.optimizer.default, field) == row
  c = get_config("shampoo")
  with pytest.raises(config.ConfigError, match=r"optimizer\.root = 'cholesky': expected one of"):
    config.resolve(config.override(c, {"optimizer.root": "cholesky"}))


@pytest.mark.parametrize(
  "name, field, value, message",
  [
    ("adamw", "b2", 1.0, "from 0 to below 1"),
    ("muon", "ns_steps", 0, "at least 1"),
    ("muon", "ns_dtype", "float16", "one of"),
    ("scion", "norm", "l1", "expected one of"),
    ("psgd", "update_probability", 0.0, "above 0"),
    ("psgd", "noise", "some", "one of"),
    ("shampoo", "b2", 1.5, "a fraction"),
    ("shampoo", "exponent", -1.0, "above 0"),
    ("shampoo", "start_step", 0, "at least 1"),
    ("soap", "shampoo_beta", 1.0, "None for b2"),
    ("soap", "precondition_frequency", 0, "at least 1"),
  ],
)
def test_what_cannot_be_is_refused_by_name(name, field, value, message):
  with pytest.raises(config.ConfigError, match=rf"optimizer\.{field} = .*{message}"):
    config.resolve(config.override(get_config(name), {f"optimizer.{field}": value}))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      "eigenvalue_correction=True",
      "grafting = 'adam': .*eigenvalue_correction works with 'none' only",
    ),
    (
      "preconditioner_dtype=bfloat16,optimizer.b2=0.995",
      r"b2 = 0\.995: averages in bfloat16 stop changing above 0\.99",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
  with pytest.raises(config.ConfigError, match=rf"optimizer\.{message}"):
    config.resolve(get_config("shampoo", f"nano,optimizer.{arguments}"))


def test_records_of_runs_without_the_younger_fields_still_resolve():
  c = get_config("shampoo")
  recorded = json.loads(json.dumps(config.to_dict(config.resolve(c))))
  for section in (recorded["optimizer"], *recorded["optimizer"]["groups"].values()):
    del section["eigenvalue_correction"]
  assert config.resolve(recorded) == config.resolve(c)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_learned_scales_are_trained_as_vectors_but_never_decay(path):
  """They are logarithms, so decay would pull scales towards one. The same holds for runs recorded
  when they belonged to the vectors."""
  decay = dict.fromkeys(("optimizer.weight_decay", "optimizer.groups.vector.weight_decay"), 0.1)
  groups = config.resolve(
    config.override(get_config(path.stem), {**decay, "optimizer.groups.vector.learning_rate": 0.5})
  ).optimizer.groups
  assert groups["scale"].optimizer == dataclasses.replace(
    groups["vector"].optimizer, weight_decay=0.0
  )
  recorded = config.to_dict(config.resolve(get_config(path.stem)))
  del recorded["optimizer"]["groups"]["scale"]
  assert config.resolve(recorded) == config.resolve(get_config(path.stem))


def test_what_is_none_may_be_given_and_taken_away():
  c = get_config("shampoo", "nano,optimizer.exponent=0.5")
  assert config.resolve(c).optimizer.groups["hidden"].optimizer.exponent == 0.5
  assert (
    config.resolve(config.override(c, {"optimizer.exponent": None})).optimizer.default.exponent
    is None
  )
  with pytest.raises(config.ConfigError, match=r"optimizer\.exponent"):
    config.resolve(config.override(c, {"optimizer.exponent": "half"}))
