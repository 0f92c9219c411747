"""One optimizer per parameter group, and its state split like the parameters it belongs to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config, optim
from beyond_outliers.config import hyperparameters, optimizers
from beyond_outliers.optim import groups
from beyond_outliers.train import program as program_lib
from configs import adamw, base

SCHEDULE = config.Schedule("constant", 0.0, 0.0, 0.0, 0.0)
PARAMS = {
  "embedding": jnp.ones((8, 4)),
  "layers": {"q": {"kernel": jnp.ones((2, 4, 4))}, "norm": {"gain": jnp.ones((2, 4))}},
}


def build(arg="", params=PARAMS, num_steps=10, schedule=SCHEDULE):
  return optim.build(
    config.resolve(adamw.get_config("nano" + arg)).optimizer, params, num_steps, schedule=schedule
  )


def test_each_group_trains_by_its_own_hyperparameters():
  optimizer = build(
    ",optimizer.learning_rate=0.1,optimizer.groups.hidden.learning_rate=0.03,"
    "optimizer.groups.vector.learning_rate=0.0,optimizer.groups.embedding.weight_decay=0.5"
  )
  gradient = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = jax.jit(optimizer.tx.update)(gradient, optimizer.tx.init(PARAMS), PARAMS)
  # Adam's first step is the learning rate in size, whatever the gradient; decay adds learning rate
  # · 0.5 · 1.
  np.testing.assert_allclose(updates["embedding"], -0.1 - 0.1 * 0.5, rtol=1e-5)
  np.testing.assert_allclose(updates["layers"]["q"]["kernel"], -0.03, rtol=1e-5)
  np.testing.assert_array_equal(updates["layers"]["norm"]["gain"], 0)
  assert {
    label: float(schedule(0)) for label, schedule in optimizer.schedules.items()
  } == pytest.approx({"embedding": 0.1, "hidden": 0.03, "vector": 0.0})


def test_groups_train_like_separate_runs_of_one_optimizer():
  """Splitting parameters into groups of equal hyperparameters changes nothing, and each follows the
  run's schedule."""
  schedule = config.Schedule("trapezoidal", 0.2, 0.4, 0.1, 0.0)
  optimizer = build(",optimizer.learning_rate=0.1", schedule=schedule)
  alone = optim.OPTIMIZERS["adamw"](
    optim.SCHEDULES["trapezoidal"](schedule, 0.1, 10), b1=0.9, b2=0.95, weight_decay=0.0
  )

  def train_with(tx):
    def step(carry, key):
      params, state = carry
      gradient = jax.tree.map(lambda x: x * jax.random.normal(key, x.shape), params)
      updates, state = tx.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jax.random.split(jax.random.key(0), 10))[
      0
    ][0]

  for x, y in zip(
    *(jax.tree.leaves(jax.jit(train_with, static_argnums=0)(tx)) for tx in (optimizer.tx, alone)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=1e-6)


def test_state_and_dtypes_keep_their_structure_over_a_step():
  optimizer = build()
  state = optimizer.tx.init(PARAMS)
  _, after = jax.jit(optimizer.tx.update)(PARAMS, state, PARAMS)
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize(
  "axes", ["mesh.data=2,mesh.fsdp=2,mesh.model=2", "mesh.data=1,mesh.fsdp=4,mesh.model=2"]
)
def test_moments_lie_where_their_parameters_lie(axes):
  shape = "nano,model.blocks=1,model.heads=6,model.d_head=4,data.vocab=64,context=8,batch_size=8,"
  program = program_lib.build_program(config.resolve(adamw.get_config(shape + axes)))
  state = program.init()
  of_parameter = {
    groups.path_of(path): x.sharding
    for path, x in jax.tree_util.tree_leaves_with_path(state.params)
  }
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
    name = groups.path_of(path)
    owner = next((p for p in of_parameter if name.endswith("/" + p)), None)
    if owner is None:
      assert x.shape == () and x.sharding.is_fully_replicated, name
    else:
      found.append(owner)
      assert x.sharding.is_equivalent_to(of_parameter[owner], x.ndim), name
  assert sorted(found) == sorted(2 * list(of_parameter)), "two moments per parameter"
  kernels = [path for path in of_parameter if path.endswith("kernel") or path == "embedding"]
  assert kernels and all(not of_parameter[path].is_fully_replicated for path in kernels)
  embedding = state.opt_state.inner_states["embedding"].inner_state[0].mu["embedding"]
  assert (
    embedding.addressable_shards[0].data.size
    * program.mesh.shape["fsdp"]
    * program.mesh.shape["model"]
    == embedding.size
  )


def test_a_leaf_that_only_looks_like_a_parameter_is_replicated():
  """Same path, another shape: a factored moment, say."""
  factored = optax.GradientTransformation(
    lambda params: {
      "rows": jax.tree.map(lambda x: jnp.zeros(x.shape[:1]), params),
      "full": params,
      "count": jnp.zeros(()),
    },
    None,
  )
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("x",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  params = {"embedding": jnp.zeros((8, 4))}
  shardings = optim.Optimizer(factored, None, {}, params).state_shardings({"embedding": split})
  assert shardings["full"]["embedding"] == split
  assert (
    shardings["rows"]["embedding"].is_fully_replicated and shardings["count"].is_fully_replicated
  )


def test_a_group_may_have_an_optimizer_of_its_own():
  """As Muon's embedding will: another row of the table, with all of its own keys, beside groups
  that follow the default."""
  c = base.get_config("nano")
  own = {
    "embedding": {
      "name": "adamw",
      "learning_rate": 0.5,
      "b1": 0.1,
      "b2": 0.2,
      "eps": 1e-6,
      "weight_decay": 0.0,
    }
  }
  c.optimizer = base.optimizer(
    "other", groups={**own, "vector": {"learning_rate": 0.25}}, learning_rate=0.1, momentum=0.9
  )
  with pytest.MonkeyPatch.context() as patch:
    other = dataclasses.make_dataclass(
      "Other", [("momentum", float)], bases=(hyperparameters.Section,), frozen=True
    )
    patch.setitem(config.OPTIMIZERS, "other", other)
    c.optimizer.learning_rate = 0.2
    groups = config.resolve(c).optimizer.groups
  assert groups["embedding"].optimizer == optimizers.AdamW("adamw", 0.5, 0.1, 0.2, 1e-6, 0.0)
  assert groups["vector"].optimizer == other("other", 0.25, 0.9)
  assert groups["hidden"].optimizer == other("other", 0.2, 0.9), (
    "a group without a value of its own follows the default"
  )
