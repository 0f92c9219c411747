"""Paths of parameters: functions that undo each other, and leave what lies outside the layers."""

import jax
import numpy as np
import pytest

from beyond_outliers import params

LAYER, STACK, KIND = "layers/13/mlp/up", "layers/mlp/up", "mlp/up"
OUTSIDE = ("head", "embedding", "final_norm/gain", "layersnorm/gain")


@pytest.fixture
def tree():
  stack = np.arange(6.0).reshape(3, 2)
  return {
    "head": {"kernel": np.ones(2)},
    "layers": {"mlp": {"up": {"kernel": stack}, "down": {"kernel": (stack, -stack)}}},
    "embedding": np.zeros(4),
  }


def test_the_three_names_of_a_linear_layer():
  assert params.layer_path(13, KIND) == params.at_depth(STACK, 13) == LAYER
  assert params.stack_path(LAYER) == STACK
  assert params.kind_of(LAYER) == KIND
  assert params.depth_of(LAYER) == 13
  assert params.at_any_depth(LAYER) == "layers/*/mlp/up"
  assert params.parent(params.kernel_path(STACK)) == STACK
  assert params.is_kernel(params.kernel_path(LAYER)) and not params.is_kernel(LAYER)
  assert params.is_stacked(STACK)


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_lies_outside_the_layers_has_one_name(path):
  assert params.at_depth(path, 3) == params.stack_path(path) == params.kind_of(path) == path
  assert params.at_any_depth(path) == path
  assert params.depth_of(path) is None
  assert not params.is_stacked(path)


def test_a_path_is_what_jax_calls_it(tree):
  named = {params.path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
  assert set(named) - {f"layers/mlp/down/kernel/{i}" for i in (0, 1)} == set(
    params.leaves_by_path(tree)
  ) - {"layers/mlp/down/kernel"}


def test_leaves_by_path_and_back(tree):
  leaves = params.leaves_by_path(tree)
  assert list(leaves) == [
    "head/kernel",
    "layers/mlp/up/kernel",
    "layers/mlp/down/kernel",
    "embedding",
  ]
  assert all(params.subtree(tree, path) is leaf for path, leaf in leaves.items())
  again = params.tree_of(leaves)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  assert list(again) == list(tree)


def test_with_leaves_changes_those_alone(tree):
  changed = params.with_leaves(tree, {"layers/mlp/up/kernel": 1, "head/scale": 2})
  assert params.leaves_by_path(changed) == {
    **params.leaves_by_path(tree),
    "layers/mlp/up/kernel": 1,
    "head/scale": 2,
  }
  assert params.with_leaves(tree, {}).keys() == tree.keys()
  assert "scale" not in tree["head"]


def test_a_node_that_is_not_there(tree):
  assert params.subtree(tree, "layers/mlp") is tree["layers"]["mlp"]
  with pytest.raises(KeyError, match="gate"):
    params.subtree(tree, "layers/mlp/gate/kernel")


def test_a_slice_of_stacked_parameters(tree):
  first, second = params.slice_at(tree["layers"], 2)["mlp"]["down"]["kernel"]
  np.testing.assert_array_equal(first, [4, 5])
  np.testing.assert_array_equal(second, [-4, -5])
