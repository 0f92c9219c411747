"""What the log is told of an optimizer's state and of its updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import optim
from beyond_outliers.optim import metrics


class Bucket(NamedTuple):
  kept: Any
  age: Any
  residual: Any


class State(NamedTuple):
  blocks: dict[str, Bucket]


def test_numbers_of_all_blocks_become_one():
  def ints(*values):
    return jnp.array(values)

  state = (
    State(
      {
        "4": Bucket(ints([1], [2]), ints([0], [7]), jnp.array([[0.1], [0.5]])),
        "8": Bucket(ints([3]), ints([-1]), jnp.array([[0.2]])),
      }
    ),
    optax.EmptyState(),
  )
  found = {name: float(value) for name, value in metrics.of_state(state).items()}
  assert found == pytest.approx({"roots/kept": 6, "roots/age": 7, "roots/residual": 0.5})


def test_a_parameter_of_such_a_name_is_none_of_them():
  params = {"blocks": {"kept": jnp.ones(3), "age": jnp.ones((2, 2))}}
  assert metrics.of_state(optim.adamw(0.1).init(params)) == {}


def test_rms_is_of_the_whole_group_and_the_spectral_norm_of_its_largest_matrix():
  rng = np.random.default_rng(0)
  update = {
    "a": rng.standard_normal((2, 3, 4)),
    "b": rng.standard_normal((5, 6)),
    "g": rng.standard_normal((2, 7)),
  }
  labels = {"a": "hidden", "b": "hidden", "g": "vector"}
  axes = {
    "a": optim.Axes((0,), (1,), (2,)),
    "b": optim.Axes((), (0,), (1,)),
    "g": optim.Axes((0,), (), (1,)),
  }
  found = jax.jit(lambda update: metrics.of_update(update, labels, axes))(
    jax.tree.map(jnp.float32, update)
  )
  assert sorted(found) == ["update_rms/hidden", "update_rms/vector", "update_spectral_norm/hidden"]
  both = np.concatenate([update["a"].ravel(), update["b"].ravel()])
  np.testing.assert_allclose(found["update_rms/hidden"], np.sqrt(np.mean(both**2)), rtol=1e-6)
  np.testing.assert_allclose(
    found["update_rms/vector"], np.sqrt(np.mean(update["g"] ** 2)), rtol=1e-6
  )
  largest = max(np.linalg.norm(m, 2) for m in (*update["a"], update["b"]))
  np.testing.assert_allclose(found["update_spectral_norm/hidden"], largest, rtol=0.03)


def test_a_shampoo_run_tells_of_its_roots():
  """Of a diagonal factor, so that its condition is known: the mean of G Gᵀ has eigenvalues 4 and 1,
  and eps adds 0.5 to the 1."""
  tx = optim.scale_by_shampoo(b2=0.9, eps=0.5)
  params = {"w": jnp.diag(jnp.array([2.0, 1.0]))}
  state = tx.init(params)
  for _ in range(3):
    _, state = jax.jit(tx.update)(params, state)
  found = metrics.of_state(state)
  assert found["roots/kept"] == 0 and found["roots/age"] == 0 and found["roots/residual"] < 1e-5
  np.testing.assert_allclose(found["roots/condition"], 4 / 1.5, rtol=1e-4)
