"""optax.inject_hyperparams takes every factory as it is: numbers may change at every step, integers
never."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers.optim import factory


@factory.static_integers
def scaled(
  learning_rate,
  *,
  steps: int = 3,
  period: int | None = None,
  size: int | None = None,
  decay: float = 0.5,
  offset=0.0,
  flag: bool = True,
  name: str = "a",
):
  """A factory whose program is as long as `steps`."""
  assert {type(value) for value in (steps, period, size)} <= {int, type(None)}

  def update(updates, state, params=None):
    del params
    for _ in range(steps + (period or 0)):
      updates = jax.tree.map(lambda u: decay * u, updates)
    return jax.tree.map(lambda u: learning_rate * u + offset, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_the_signature_and_the_defaults_are_the_factorys_own():
  assert scaled.__name__ == "scaled" and "as long as" in scaled.__doc__
  defaults = {name: p.default for name, p in inspect.signature(scaled).parameters.items()}
  assert defaults == {
    "learning_rate": inspect.Parameter.empty,
    "steps": 3,
    "period": None,
    "size": None,
    "decay": 0.5,
    "offset": 0.0,
    "flag": True,
    "name": "a",
  }
  updates, _ = scaled(2.0).update(jnp.ones(2), optax.EmptyState())
  np.testing.assert_array_equal(updates, 2 * 0.5**3)


def test_hyperparameters_can_be_injected_into_a_factory_as_it_is():
  params = {"w": jnp.ones(2)}
  tx = optax.inject_hyperparams(scaled)(learning_rate=2.0)
  state = tx.init(params)
  assert state.hyperparams.keys() == {"learning_rate", "decay", "offset"}
  update = jax.jit(tx.update)
  for rate, decay in ((2.0, 0.5), (3.0, 0.25)):
    state.hyperparams.update(learning_rate=jnp.float32(rate), decay=jnp.float32(decay))
    updates, state = update(params, state, params)
    np.testing.assert_array_equal(updates["w"], rate * decay**3)
  assert update._cache_size() == 1


@pytest.mark.parametrize(
  "value", [2, np.int64(2), np.array(2)], ids=["int", "numpy", "array of numpy"]
)
def test_integers_of_all_kinds_are_pythons(value):
  updates, _ = scaled(2.0, steps=value).update(jnp.ones(2), optax.EmptyState())
  np.testing.assert_array_equal(updates, 2 * 0.5**2)


@pytest.mark.parametrize("argument", ["steps", "period"])
def test_an_integer_that_is_traced_is_refused_with_the_remedy(argument):
  params = {"w": jnp.ones(2)}
  with pytest.raises(
    TypeError,
    match=f"{argument}: must be a Python integer; give inject_hyperparams static_args='{argument}'",
  ):
    optax.inject_hyperparams(scaled)(2.0, **{argument: 2}).init(params)
  with pytest.raises(TypeError, match=f"{argument}: must be a Python integer"):
    jax.jit(lambda n: scaled(2.0, **{argument: n}).update(params, optax.EmptyState())[0])(2)
  with pytest.raises(TypeError, match="float"):
    scaled(2.0, **{argument: 2.0})
  tx = optax.inject_hyperparams(scaled, static_args=argument)(2.0, **{argument: 2})
  assert tx.init(params).hyperparams.keys() == {"learning_rate", "decay", "offset"}


def test_a_name_that_is_not_allowed_brings_the_nearest():
  factory.one_of("scale", "original", {"original": 1, "other": 2})
  with pytest.raises(
    ValueError,
    match=r"^scale = 'orignal': did you mean 'original'\? expected one of 'original', 'other'$",
  ):
    factory.one_of("scale", "orignal", ("original", "other"))
  with pytest.raises(ValueError, match=r"^scale = 'xyz': expected one of 'original', 'other'$"):
    factory.one_of("scale", "xyz", ("original", "other"))
