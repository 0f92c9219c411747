"""One contract for every row of optim.OPTIMIZERS. A new row needs a line in SETTINGS, and nothing
else here.

Two groups of parameters train for six steps on gradients that depend on them, through `optim.build`
and a step jitted as the trainer's: on a mesh of eight devices, of four and of one, straight through
or from a checkpoint. What optax wraps around a factory is tried on one device, on two leaves.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import configs
from beyond_outliers import checkpoint, config, mesh, optim
from beyond_outliers.optim import blocks
from beyond_outliers.params import Axes, path_of
from beyond_outliers.train import program as program_lib
from beyond_outliers.train.step import TrainState, init_state

# Chosen so that six steps on tiny matrices exercise all of a row: decay, several blocks per matrix,
# roots or bases renewed between steps; and so that rounding is not amplified: square blocks, whose
# factors have full rank, and an eps far above the noise of vectors' factors, which don't.
SETTINGS = {
  "adamw": dict(weight_decay=0.1),
  "muon": dict(weight_decay=0.1, ns_dtype="float32", adam_learning_rate=0.05),
  "psgd": dict(weight_decay=0.1),
  "scion": dict(momentum=0.9, ns_dtype="float32"),
  "shampoo": dict(
    weight_decay=0.1,
    block_size=8,
    grafting="adam",
    precondition_frequency=2,
    refresh="staggered",
    eps=0.1,
    b2=0.95,
  ),
  "soap": dict(weight_decay=0.1, block_size=8, precondition_frequency=2),
}
CUT = [name for name in optim.OPTIMIZERS if "block_size" in SETTINGS.get(name, ())]
RATE, STEPS, SAVED_AT = 0.05, 6, 3

SHAPES = {
  "embedding": (24, 8),
  "gain": (2, 8),
  "kernel": (2, 8, 16),
  "scale": (2, 2),
  "temperature": (),
  "up": (2, 16, 8),
}
AXES = {
  "embedding": Axes((), (1,), (0,)),
  "gain": Axes((0,), (), (1,)),
  "kernel": Axes((0,), (1,), (2,)),
  "scale": Axes((0, 1)),
  "temperature": Axes(),
  "up": Axes((0,), (1,), (2,)),
}
GROUPS = {"hidden": "kernel|up|embedding", "vector": "gain|scale|temperature"}
SPLIT = {
  "embedding": ("model", "fsdp"),
  "kernel": (None, "fsdp", "model"),
  "up": (None, "model", "fsdp"),
}
MESHES = {1: config.Mesh(1, 1, 1), 4: config.Mesh(1, 2, 2), 8: config.Mesh(2, 2, 2)}
SMALL = ("gain", "kernel")


def normal(seed, names=tuple(SHAPES)):
  """As numpy, since arrays on one device would not fit another mesh."""
  draw = np.random.default_rng(seed)
  tree = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
  return {name: tree[name] for name in names}


def settings_of(name):
  if name not in SETTINGS:
    pytest.fail(
      f"optim.OPTIMIZERS has {name!r}, SETTINGS of this file has not: add the arguments to test it "
      "with"
    )
  return SETTINGS[name]


def configured(name):
  """The section of a configuration that `optim.build` makes a row from."""
  values = {"name": name, "learning_rate": RATE, **settings_of(name)}
  return dataclasses.make_dataclass("Section", list(values), frozen=True)(**values)


def shapes_of(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_close(actual, expected, tolerance):
  """Of each leaf, as a part of its largest number."""
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=path_of(path)
    )


def assert_finite(tree):
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(np.asarray(x, np.float32)).all(), path_of(path)


class Run:
  """A row of the table on a mesh."""

  def __init__(self, name, devices, **changes):
    self.mesh = mesh.make_mesh(MESHES[devices], jax.devices()[:devices])
    section = dataclasses.replace(configured(name), **changes)
    groups = {label: config.Group(paths, section) for label, paths in GROUPS.items()}
    self.start = normal(0)
    self.optimizer = optim.build(
      config.OptimizerGroups(section, groups),
      self.start,
      STEPS,
      axes=AXES,
      mesh=self.mesh,
      schedule=config.Schedule("constant", 0.0, 0.0, 0.0, 0.0),
    )
    of_params = {name: jax.NamedSharding(self.mesh, jax.P(*SPLIT.get(name, ()))) for name in SHAPES}
    whole = mesh.replicated(self.mesh)
    shardings = TrainState(
      whole, of_params, self.optimizer.state_shardings(of_params), whole, whole
    )
    self.state = mesh.placed(jax.eval_shape(self._init), shardings)
    self.step = jax.jit(self._step, out_shardings=shardings, donate_argnums=0)

  def _init(self):
    return init_state(jax.tree.map(jnp.asarray, self.start), self.optimizer.tx)

  def _step(self, state, target):
    gradient = jax.tree.map(jnp.subtract, state.params, target)
    updates, opt_state = self.optimizer.tx.update(gradient, state.opt_state, state.params)
    return state._replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )

  def begin(self):
    state, seen = self._init(), {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
      # An array that is donated twice is the end of the process.
      assert seen.setdefault(id(x), path) == path, (
        f"{path_of(path)} is the same array as {path_of(seen[id(x)])}"
      )
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.state))

  def go_on(self, state, until=STEPS):
    with mesh.use(self.mesh):
      for number in range(int(state.step), until):
        state = self.step(state, normal(1 + number))
    return state


class Row:
  """What the tests of a row look at: computed when first asked for, once."""

  def __init__(self, name, folder):
    self.name, self.folder = name, folder
    self.run = functools.cache(functools.partial(Run, name))
    self.straight = functools.cache(
      lambda devices: self.run(devices).go_on(self.run(devices).begin())
    )
    self.saved = functools.cache(self._saved)
    self.resumed = functools.cache(
      lambda before, after: self.run(after).go_on(self.restored(before, self.run(after).state))
    )

  def _saved(self, devices):
    state = self.run(devices).go_on(self.run(devices).begin(), SAVED_AT)
    options = config.Checkpoint(every=1, keep=1, keep_every=0, verify=True)
    checkpoints = checkpoint.Checkpoints(self.folder / str(devices), options)
    checkpoints.save(SAVED_AT, state, {"batches": SAVED_AT}, {"seconds": 0.0, "tokens": 0.0})
    checkpoints.close()
    return checkpoint.Checkpoints(self.folder / str(devices), read_only=True)

  def restored(self, devices, want):
    """What a run on so many devices saved, as `want` would have it."""
    number, state, _, _ = self.saved(devices).restore(want)
    assert number == SAVED_AT
    return state

  def factory(self, **arguments):
    return optim.OPTIMIZERS[self.name](RATE, axes=AXES, **{**settings_of(self.name), **arguments})

  @functools.cached_property
  def alone(self):
    """The factory as it is: a function of gradients -> updates of two leaves at every step."""
    return follow(self.factory(), normal(0, SMALL))


def follow(tx, params):
  """A function from gradients to updates of each step; one program, with constant parameters."""
  update = jax.jit(tx.update)

  def updates_of(gradients):
    state, updates = tx.init(params), []
    for gradient in gradients:
      latest, state = update(gradient, state, params)
      updates.append(jax.device_get(latest))
    assert update._cache_size() == 1
    assert_finite(state)
    return updates

  return updates_of


SLOW = ("psgd",)  # to compile


@pytest.fixture(
  scope="module",
  params=[
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in optim.OPTIMIZERS
  ],
)
def row(request, tmp_path_factory):
  return Row(request.param, tmp_path_factory.mktemp(request.param))


def test_every_row_has_settings():
  assert not SETTINGS.keys() ^ optim.OPTIMIZERS.keys(), (
    "either not in optim.OPTIMIZERS, or not in SETTINGS of this file"
  )


def test_eight_devices_do_what_one_does(row):
  eight, one = row.straight(8), row.straight(1)
  assert_close(eight.params, one.params, 1e-5)
  for name, start in normal(0).items():
    assert abs(np.asarray(eight.params[name]) - start).max() > RATE, (
      f"{name} hardly moves: the test would see nothing"
    )


def test_no_device_has_more_than_its_share(row):
  state, devices = row.straight(8), row.run(8).mesh.size
  for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
    if blocks.belongs_to_blocks(path):
      assert x.addressable_shards[0].data.shape == (x.shape[0] // devices, *x.shape[1:]), path_of(
        path
      )
    elif x.size > SHAPES["gain"][0] * SHAPES["gain"][1]:
      assert not x.sharding.is_fully_replicated, path_of(path)


def test_one_program_for_every_step(row):
  row.straight(8), row.resumed(8, 8), row.resumed(1, 8)
  assert row.run(8).step._cache_size() == 1, (
    "steps of a run, and of runs that go on from checkpoints"
  )


@pytest.mark.parametrize(
  "gradient, param", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_state_and_updates_keep_their_types(row, gradient, param):
  tree = {name: jax.ShapeDtypeStruct(shape, param) for name, shape in SHAPES.items()}
  gradients = {name: jax.ShapeDtypeStruct(shape, gradient) for name, shape in SHAPES.items()}
  tx = row.factory()
  state = jax.eval_shape(tx.init, tree)
  updates, after = jax.eval_shape(tx.update, gradients, state, tree)
  assert after == state
  assert jax.eval_shape(optax.apply_updates, tree, updates) == tree
  if gradient == param:
    assert updates == tree
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    assert x.dtype != jnp.bfloat16, path_of(path)


@pytest.mark.parametrize(
  "row, changes",
  [
    ("psgd", dict(max_size_triangular=0)),
    ("shampoo", dict(block_size=4, long_axes="skip")),
    ("soap", dict(max_dim=0)),
  ],
  indirect=["row"],
)
def test_no_array_of_the_state_is_empty(row, changes):
  """Not even where nothing is preconditioned: Orbax refuses to save such a state."""
  for tx in (row.factory(), row.factory(**changes)):
    for path, x in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, normal(0))):
      assert x.size, path_of(path)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(row):
  straight, resumed = row.straight(8), row.resumed(8, 8)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(resumed), jax.tree.leaves(straight), strict=True
  ):
    np.testing.assert_array_equal(x, y, err_msg=path_of(path))


@pytest.mark.parametrize("before, after", [(8, 4), (8, 1), (1, 8)])
def test_a_run_goes_on_on_another_mesh(row, before, after):
  """Blocks of padding come and go: nothing else may change."""
  want = row.run(after).state
  restored, written = row.restored(before, want), row.restored(before, row.run(before).state)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(written), strict=True
  ):
    x, y = np.asarray(x), np.asarray(y)
    if blocks.belongs_to_blocks(path):
      count = min(len(x), len(y))
      assert not x[count:].any(), path_of(path)
      x, y = x[:count], y[:count]
    np.testing.assert_array_equal(x, y, err_msg=path_of(path))
  resumed = row.resumed(before, after)
  assert len(resumed.params["kernel"].sharding.device_set) == after
  assert_close(resumed.params, row.straight(8).params, 1e-5)
  assert_finite(resumed)


@pytest.mark.parametrize("which", ["params", "opt_state"])
def test_a_checkpoint_of_another_shape_is_refused(row, which):
  """Of blocks only the number may differ; of all else, not even the first axis."""
  want = row.run(8).state
  leaves, structure = jax.tree.flatten(want)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(want)]
  for number, (path, x) in enumerate(zip(paths, leaves, strict=True)):
    axis = 1 if blocks.belongs_to_blocks(path) else 0
    if path_of(path).startswith(which) and x.ndim > axis:
      changed = jax.ShapeDtypeStruct(
        (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :]), x.dtype, sharding=x.sharding
      )
      with pytest.raises(
        checkpoint.CheckpointError, match=re.escape(path_of(path)) + " is .*in the checkpoint and"
      ):
        row.restored(
          8, jax.tree.unflatten(structure, [*leaves[:number], changed, *leaves[number + 1 :]])
        )


@pytest.mark.parametrize("row", CUT, indirect=True)
def test_a_checkpoint_of_another_block_size_is_refused(row):
  with pytest.raises(
    checkpoint.CheckpointError, match=r"blocks/.*was the model or optimizer changed"
  ):
    row.restored(8, Run(row.name, 8, block_size=4).state)


def test_hyperparameters_can_be_injected(row):
  """Every number may be traced. A rate of twice the size makes an update of twice the size, but for
  the decay of what it adds."""
  integers = [name for name, value in settings_of(row.name).items() if type(value) is int]
  params = normal(0, SMALL)
  tx = optax.inject_hyperparams(optim.OPTIMIZERS[row.name], static_args=integers)(
    learning_rate=RATE, axes=AXES, **settings_of(row.name)
  )
  state, update = tx.init(params), jax.jit(tx.update)
  gradients = [normal(seed, SMALL) for seed in (1, 2, 3)]
  for gradient, expected in zip(gradients, row.alone(gradients), strict=True):
    before = state
    updates, state = update(gradient, before, params)
    assert_close(updates, expected, 1e-5)
  state = before._replace(
    hyperparams={**before.hyperparams, "learning_rate": jnp.float32(2 * RATE)}
  )
  larger, _ = update(gradient, state, params)
  assert_close(larger["kernel"], 2 * updates["kernel"], RATE)
  assert update._cache_size() == 1


def test_accumulated_gradients_make_the_step_of_their_mean(row):
  gradients = [normal(seed, SMALL) for seed in (1, 2, 3)]
  halves = [
    jax.tree.map(lambda g, part=part: part * g, gradient)
    for gradient in gradients
    for part in (0.5, 1.5)
  ]
  accumulated = follow(optax.MultiSteps(row.factory(), 2), normal(0, SMALL))(halves)
  assert not any(x.any() for updates in accumulated[::2] for x in jax.tree.leaves(updates))
  for updates, expected in zip(accumulated[1::2], row.alone(gradients), strict=True):
    assert_close(updates, expected, 1e-5)


def test_masked_leaves_are_left_alone(row):
  """The others train as if they had no company."""
  params, mask = normal(0), {name: name in SMALL for name in SHAPES}
  gradients = [normal(seed) for seed in (1, 2, 3)]
  masked = follow(optax.masked(row.factory(), mask), params)(gradients)
  alone = row.alone([{name: gradient[name] for name in SMALL} for gradient in gradients])
  for updates, expected, gradient in zip(masked, alone, gradients, strict=True):
    assert_close({name: updates[name] for name in SMALL}, expected, 1e-5)
    for name in SHAPES.keys() - set(SMALL):
      np.testing.assert_array_equal(updates[name], gradient[name])


def test_zero_gradients_do_no_harm(row):
  """At first, as an unused layer has, between others, and in one leaf alone."""
  zero, one, other = (
    jax.tree.map(np.zeros_like, normal(0, SMALL)),
    normal(1, SMALL),
    normal(2, SMALL),
  )
  for updates in row.alone([zero, zero, one, zero, {**other, "kernel": zero["kernel"]}, other]):
    assert_finite(updates)


def test_bfloat16_gradients_do_almost_the_same(row):
  gradients = [normal(seed, SMALL) for seed in (1, 2, 3)]
  rounded = [jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient) for gradient in gradients]
  for updates, expected in zip(
    follow(row.factory(), normal(0, SMALL))(rounded), row.alone(gradients), strict=True
  ):
    assert_finite(updates)
    for name in SMALL:
      distance = np.linalg.norm(updates[name].astype(np.float32) - expected[name])
      assert distance <= 0.2 * np.linalg.norm(expected[name]), name


def test_bfloat16_parameters_with_all_that_optax_wraps(row):
  """Matrices of one row, scalars, a leaf without gradient, and no gradient at all at first. In
  bfloat16, to which inject_hyperparams casts by default, 1 - 0.999 would be zero."""
  static = [name for name, value in settings_of(row.name).items() if type(value) is int]
  injected = optax.inject_hyperparams(
    optim.OPTIMIZERS[row.name], static_args=static, hyperparam_dtype=jnp.float32
  )
  tx = optax.MultiSteps(injected(learning_rate=RATE, **settings_of(row.name)), 2)
  draw = np.random.default_rng(0)
  params = {
    name: jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)
    for name, shape in {"m": (4, 6), "row": (1, 5), "s": (), "never": (4, 6)}.items()
  }
  before, state, update = params, tx.init(params), jax.jit(tx.update)
  for size in (0, 0, 1, 1, 1, 1):
    gradients = {
      name: jnp.asarray((name != "never") * size * draw.standard_normal(x.shape), x.dtype)
      for name, x in params.items()
    }
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  assert_finite(params)
  assert {x.dtype for x in params.values()} == {jnp.dtype("bfloat16")}
  assert all((params[name] != before[name]).any() for name in ("m", "row", "s"))


@pytest.mark.parametrize("kind", ["dict", "list", "namedtuple", "nothing"])
def test_any_tree_of_leaves_of_any_size(row, kind):
  """Leaves without elements, of one, of several types; None is none. What comes back is like what
  came, and no array of the state is empty."""

  def leaf(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)

  empty = [leaf(0), leaf(0, 4), leaf(4, 0), leaf(0, 3, 4), leaf(2, 3, 0)]
  narrow = [leaf(3, 4, dtype="float16"), leaf(4, dtype="bfloat16")]
  tree = {
    "dict": {"empty": empty, "none": None, "nested": {}, "m": leaf(3, 4)},
    "list": [leaf(), leaf(1), (leaf(1, 1), leaf(1, 5), leaf(5, 1)), narrow, *empty],
    "namedtuple": Axes(leaf(3, 4), leaf(0), leaf(2, 0)),
    "nothing": {},
  }[kind]
  tx = optim.OPTIMIZERS[row.name](RATE, **settings_of(row.name))
  state = jax.eval_shape(tx.init, tree)
  updates, after = jax.eval_shape(tx.update, tree, state, tree)
  assert updates == tree and after == state
  if any(x.size for x in jax.tree.leaves(tree)) and row.name != "adamw":
    assert all(x.size for x in jax.tree.leaves(state) if x.ndim > 1)


@pytest.mark.parametrize("bad", [np.arange(3), np.ones(3, bool), np.ones(3, complex), 1.0])
def test_leaves_that_do_not_move_are_refused(row, bad):
  tx = optim.OPTIMIZERS[row.name](RATE, **settings_of(row.name))
  message = r"^parameter 'a/b' = '\w+': expected an array of real floating-point numbers; leave"
  with pytest.raises(config.ConfigError, match=message):
    tx.update({"a": {"b": bad}}, tx.init({"a": {"b": bad}}), {"a": {"b": bad}})
  masked = optax.masked(tx, {"a": False, "b": True})
  masked.init({"a": bad, "b": jnp.ones(3)})


CONFIGS = [
  module.name for module in pkgutil.iter_modules(configs.__path__) if module.name != "base"
]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_the_model_has_one_group(name):
  """Of every configuration: no other group's paths match it, so that their order does not
  matter."""
  c = config.resolve(importlib.import_module(f"configs.{name}").get_config("nano"))
  program = program_lib.build_program(c, jax.devices()[:1])
  labels = {
    path_of(path): label
    for path, label in jax.tree_util.tree_leaves_with_path(program.optimizer.labels)
  }
  assert len(labels) == len(jax.tree.leaves(program.state.params))
  for path, label in labels.items():
    assert [
      other for other, group in c.optimizer.groups.items() if re.fullmatch(group.paths, path)
    ] == [label]
