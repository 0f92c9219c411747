"""Parameter groups: every parameter in exactly one, and what fits nowhere is refused by name."""

import importlib
import pathlib

import jax
import pytest

import configs.adamw
from beyond_outliers import config
from beyond_outliers.optim import groups
from beyond_outliers.train import program as program_lib

NAMES = sorted(
  path.stem
  for path in pathlib.Path(configs.__file__).parent.glob("*.py")
  if path.stem not in ("__init__", "base")
)
TREE = {
  "embedding": 0,
  "layers": {"attention": {"q": {"kernel": 0}, "scale": 0}, "norm": {"gain": 0}},
  "final_norm": {"gain": 0},
}


def labelled(**paths):
  tree = groups.labels(TREE, {label: config.Group(regex, None) for label, regex in paths.items()})
  return {groups.path_of(path): label for path, label in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_first_group_that_matches_a_whole_path_wins():
  assert labelled(vector=r".*/(gain|scale)", embedding="embedding", hidden=".*") == {
    "embedding": "embedding",
    "layers/attention/q/kernel": "hidden",
    "layers/attention/scale": "vector",
    "layers/norm/gain": "vector",
    "final_norm/gain": "vector",
  }
  assert set(labelled(final="final_norm/.*", vector=".*gain", rest=".*").values()) == {
    "final",
    "vector",
    "rest",
  }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  "switches",
  ["", ",model.tied=False", ",model.mlp=swiglu,model.qk_norm=rms,model.attention_scale=rsqrt"],
)
def test_the_studys_groups_hold_every_parameter(name, switches):
  """embedding: the table; vector: gains and scales; hidden: matrices, also a head of its own."""
  program = program_lib.build_program(
    config.resolve(importlib.import_module(f"configs.{name}").get_config("nano" + switches))
  )
  labels = {
    groups.path_of(path): label
    for path, label in jax.tree_util.tree_leaves_with_path(program.optimizer.labels)
  }
  shapes = {
    groups.path_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.params)
  }
  assert labels.keys() == shapes.keys()
  for path, label in labels.items():
    kind = path.split("/")[-1]
    assert (
      label
      == {"embedding": "embedding", "kernel": "hidden", "gain": "vector", "scale": "vector"}[kind]
    ), path
  assert ("head/kernel" in labels) == ("tied=False" in switches)


def test_a_parameter_without_group_is_named():
  with pytest.raises(
    config.ConfigError,
    match=r"optimizer.groups = .*no group matches parameter 'layers/attention/q/kernel'",
  ):
    labelled(vector=".*(gain|scale)", embedding="embedding", hidden="kernel")


def test_a_group_without_parameters_is_named():
  with pytest.raises(
    config.ConfigError, match=r"optimizer.groups.head.paths = 'head/.\*': matches no parameter"
  ):
    labelled(rest=".*", head="head/.*")


def test_learned_scales_are_a_group_where_there_are_some():
  others = {"embedding", "vector", "hidden"}
  for recipe, expected in (("quest_w4a4", others), ("lsq_w4a4", {*others, "scale"})):
    optimizer = program_lib.build_program(
      config.resolve(configs.adamw.get_config(f"nano,quant.recipe={recipe}"))
    ).optimizer
    assert set(optimizer.schedules) == set(jax.tree.leaves(optimizer.labels)) == expected
    assert optimizer.labels["layers"]["mlp"]["up"].get(
      "QuantizedDot_0", {"log_scale": "scale"}
    ) == {"log_scale": "scale"}
