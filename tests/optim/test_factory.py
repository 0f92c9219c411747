"""optax.inject_hyperparams takes every factory as it is: numbers may change at every step, integers
never."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config
from beyond_outliers.config.hyperparameters import Section, at_least, official, one_of
from beyond_outliers.optim import factory


@dataclasses.dataclass(frozen=True)
class Scaled(Section):
  steps: int = official(3, "how often updates are scaled", at_least(1))
  rounds: int | None = official(None, "more of these")
  size: int | None = official(None, "nothing")
  decay: float = official(0.5, "what they are scaled by", at_least(0))
  offset: float = official(0.0, "added in the end")
  flag: bool = official(True, "nothing")
  word: str = official("a", "nothing", one_of("a", "abc"))


@factory.arguments_of(Scaled)
def scaled(h):
  """A factory whose program is as long as `steps`."""
  assert {type(value) for value in (h.steps, h.rounds, h.size)} <= {int, type(None)}

  def update(updates, state, params=None):
    del params
    for _ in range(h.steps + (h.rounds or 0)):
      updates = jax.tree.map(lambda u: h.decay * u, updates)
    return jax.tree.map(lambda u: h.learning_rate * u + h.offset, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_the_signature_and_the_defaults_are_the_factorys_own():
  assert scaled.__name__ == "scaled" and "as long as" in scaled.__doc__
  defaults = {name: p.default for name, p in inspect.signature(scaled).parameters.items()}
  assert defaults == {
    "learning_rate": inspect.Parameter.empty,
    "steps": 3,
    "rounds": None,
    "size": None,
    "decay": 0.5,
    "offset": 0.0,
    "flag": True,
    "word": "a",
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


@pytest.mark.parametrize("argument", ["steps", "rounds"])
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


def test_the_lines_of_hyperparameters_are_documentation():
  lines = scaled.__doc__.splitlines()
  assert lines[0] == "A factory whose program is as long as `steps`."
  assert lines[-1] == "word: nothing (a | abc)"
  assert lines[2:5] == [
    "learning_rate: of the whole step; may be a schedule",
    "steps: how often updates are scaled",
    "rounds: more of these",
  ]


def test_a_factory_may_leave_hyperparameters_official_or_fix_them():
  @factory.arguments_of(Scaled, without=("learning_rate", "rounds"), steps=1)
  def fixed(h, *, axes=None):
    return h, axes

  assert list(inspect.signature(fixed).parameters)[:2] == ["axes", "size"]
  h, axes = fixed(decay=0.25, axes="given")
  assert axes == "given"
  assert h == Scaled("fixed", 1.0, 1, None, None, 0.25, 0.0, True, "a")
  for name in ("learning_rate", "rounds", "steps"):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
      fixed(**{name: 1})


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(decay=-1.0), "^decay = -1.0: expected at least 0$"),
    (dict(steps=0), "^steps = 0: expected at least 1$"),
    (dict(decay="fast"), "^decay = 'fast': expected a number$"),
    (dict(decay=None), "^decay = None: expected a value; leave the argument out for the default$"),
    (dict(word="abd"), r"^word = 'abd': did you mean 'abc'\? expected one of 'a', 'abc'$"),
  ],
)
def test_a_value_that_breaks_its_rule_is_refused(hyper, message):
  with pytest.raises(config.ConfigError, match=message):
    scaled(2.0, **hyper)


def test_what_is_traced_or_scheduled_is_not_looked_at():
  scaled(lambda count: -1.0, decay=jnp.float32(-1.0))
  jax.jit(lambda decay: scaled(2.0, decay=decay).update(jnp.ones(2), optax.EmptyState())[0])(-1.0)
  assert functools.partial(scaled, steps=2)(2.0).init({}) == optax.EmptyState()


def test_a_name_that_is_not_allowed_brings_the_nearest():
  factory.check_choice("scale", "original", {"original": 1, "other": 2})
  with pytest.raises(
    ValueError,
    match=r"^scale = 'orignal': did you mean 'original'\? expected one of 'original', 'other'$",
  ):
    factory.check_choice("scale", "orignal", ("original", "other"))
  with pytest.raises(ValueError, match=r"^scale = 'xyz': expected one of 'original', 'other'$"):
    factory.check_choice("scale", "xyz", ("original", "other"))
