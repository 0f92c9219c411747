"""Every number of every parameter is in exactly one block, blocks of a shape are together, each
device has its own, and all are restored."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config
from beyond_outliers.mesh import make_mesh
from beyond_outliers.optim import blocks
from beyond_outliers.params import Axes

SHAPES = {
  "cut": (3, 9, 11),
  "embedding": (18, 8),
  "gain": (3, 5),
  "row": (1, 5),
  "scalar": (),
  "scales": (2, 3),
  "several": (2, 3, 2, 6),
  "small": (2, 5, 3),
}
AXES = {
  "cut": Axes((0,), (1,), (2,)),
  "embedding": Axes((), (1,), (0,)),
  "gain": Axes((0,), (), (1,)),
  "row": Axes((), (0,), (1,)),
  "scalar": Axes(),
  "scales": Axes((0, 1)),
  "several": Axes((1,), (3,), (2, 0)),
  "small": Axes((0,), (2,), (1,)),
  "unused": Axes(),
}
# Where the slices of each lie, for numpy.
SLICE_AXES = {
  "cut": (1, 2),
  "embedding": (0, 1),
  "gain": (1,),
  "row": (0, 1),
  "scalar": (),
  "scales": (),
  "several": (0, 2, 3),
  "small": (1, 2),
}


def numbered(dtype=np.float32):
  """All the numbers from 1 on, each once."""
  ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])
  return {
    name: jnp.asarray(np.arange(end - math.prod(shape), end).reshape(shape) + 1, dtype)
    for (name, shape), end in zip(SHAPES.items(), ends, strict=True)
  }


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(config.Mesh(2, 2, 2))


@pytest.fixture(params=[1, 8], ids=["one device", "eight devices"])
def maybe_mesh(request, mesh):
  return mesh if request.param == 8 else None


@pytest.mark.parametrize("block_size, merge_up_to", [(None, 0), (4, 0), (5, 0), (16, 16)])
def test_what_is_cut_comes_back(maybe_mesh, block_size, merge_up_to):
  tree = numbered()
  layout = blocks.layout(
    tree, AXES, mesh=maybe_mesh, block_size=block_size, merge_up_to=merge_up_to
  )

  def there_and_back(tree):
    stacks = layout.stack(tree)
    squares = {name: jnp.sum(x * x, tuple(range(1, x.ndim))) for name, x in stacks.items()}
    sums = {
      name: jnp.broadcast_to(s.reshape(-1, *(1,) * (stacks[name].ndim - 1)), stacks[name].shape)
      for name, s in layout.sum_over_slices(squares).items()
    }
    return stacks, layout.unstack(stacks, tree), layout.unstack(sums, tree)

  stacks, back, sums = jax.jit(there_and_back)(tree)

  real = []
  for name, bucket in layout.buckets.items():
    assert name == "x".join(map(str, bucket.shape)) and list(bucket.shape) == sorted(bucket.shape)
    assert block_size is None or max(bucket.shape) <= block_size
    assert (
      bucket.padded % (maybe_mesh.size if maybe_mesh else 1) == 0
      and bucket.padded - bucket.count < 8
    )
    assert (
      stacks[name].shape == (bucket.padded, *bucket.shape) and stacks[name].dtype == jnp.float32
    )
    assert not stacks[name][bucket.count :].any(), "padding is zero"
    real.append(np.asarray(stacks[name][: bucket.count]).ravel())
  assert sorted(np.concatenate(real)) == list(range(1, 1 + sum(map(math.prod, SHAPES.values())))), (
    "every number once"
  )
  for name, x in tree.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)
    expected = np.square(np.asarray(x, np.float64)).sum(SLICE_AXES[name], keepdims=True)
    np.testing.assert_allclose(
      sums[name], np.broadcast_to(expected, x.shape), rtol=1e-5, err_msg=name
    )


def test_the_order_of_real_blocks_is_the_same_on_every_mesh(mesh):
  """So that a state written on one mesh can be read on another."""
  grids = [None, make_mesh(config.Mesh(1, 3, 1), jax.devices()[:3]), mesh]
  layouts = [blocks.layout(numbered(), AXES, mesh=grid, block_size=4) for grid in grids]
  assert [layout.buckets["4x4"].padded for layout in layouts] == [23, 24, 24]
  assert len({tuple(layout.buckets) for layout in layouts}) == 1
  first, *others = [jax.jit(layout.stack)(numbered()) for layout in layouts]
  for stacks in others:
    for name, bucket in layouts[0].buckets.items():
      np.testing.assert_array_equal(stacks[name][: bucket.count], first[name])


def test_a_block_is_a_part_of_one_slice():
  """Neighbours in a block are neighbours in the slice: of consecutive numbers, rows and columns
  have constant steps."""
  shape = (2, 9, 11)
  layout = blocks.layout({"w": jnp.zeros(shape)}, {"w": Axes((0,), (1,), (2,))}, block_size=4)
  assert {name: bucket.count for name, bucket in layout.buckets.items()} == {
    "4x4": 8,
    "3x4": 4,
    "1x4": 4,
    "1x3": 2,
  }
  stacks = layout.stack({"w": jnp.arange(math.prod(shape)).reshape(shape)})
  corners = collections.Counter()
  for name, stack in stacks.items():
    for block in np.asarray(stack, int):
      down, right = (11, 1) if block.shape != (3, 4) else (1, 11)  # tall ones lie transposed
      rows, columns = np.indices(block.shape)
      np.testing.assert_array_equal(block, block[0, 0] + down * rows + right * columns)
      corners[name, block[0, 0] // 99] += 1
  assert corners == {
    (name, number): stacks[name].shape[0] // 2 for name in stacks for number in (0, 1)
  }


def test_tall_and_wide_ones_share_a_bucket():
  tree = {
    "tall": jnp.arange(30.0).reshape(2, 5, 3),
    "vector": jnp.arange(5.0),
    "wide": -jnp.arange(15.0).reshape(3, 5),
  }
  layout = blocks.layout(tree)
  assert {name: (bucket.shape, bucket.count) for name, bucket in layout.buckets.items()} == {
    "3x5": ((3, 5), 3),
    "5": ((5,), 1),
  }
  stacks = layout.stack(tree)
  np.testing.assert_array_equal(
    stacks["3x5"], np.concatenate([tree["tall"].swapaxes(1, 2), tree["wide"][None]])
  )
  np.testing.assert_array_equal(stacks["5"], tree["vector"][None])


@pytest.mark.parametrize(
  "block_size, merge_up_to, names",
  [
    (None, 0, ["3x5", "5", "1"]),
    (None, 15, ["15", "5", "1"]),
    (15, 15, ["15", "5", "1"]),
    (14, 14, ["3x5", "5", "1"]),
    (4, 0, ["3x4", "1x3", "4", "1"]),
    (3, 3, ["3x3", "2x3", "3", "2", "1"]),
  ],
)
def test_names_and_merged_dims(block_size, merge_up_to, names):
  tree = {"w": jnp.zeros((5, 3)), "b": jnp.zeros(5), "s": jnp.zeros(())}
  layout = blocks.layout(
    {"w": tree["w"], "x": [tree["b"], tree["s"]]}, block_size=block_size, merge_up_to=merge_up_to
  )
  assert list(layout.buckets) == names


def test_ids_count_on_from_bucket_to_bucket(maybe_mesh):
  """Whatever the number of devices: only padding, behind the real blocks, differs."""
  layout = blocks.layout(numbered(), AXES, mesh=maybe_mesh, block_size=4)
  real = [layout.block_ids()[name][: bucket.count] for name, bucket in layout.buckets.items()]
  np.testing.assert_array_equal(np.concatenate(real), np.arange(sum(map(len, real))))
  assert all(
    len(layout.block_ids()[name]) == bucket.padded for name, bucket in layout.buckets.items()
  )


def test_values_are_those_of_the_leaf(maybe_mesh):
  tree = {
    name: jnp.full(shape, 1.0 + number) for number, (name, shape) in enumerate(SHAPES.items())
  }
  layout = blocks.layout(tree, AXES, mesh=maybe_mesh, block_size=4)
  values = layout.per_block(lambda leaf: 1.0 + list(SHAPES).index(leaf.path))
  for name, stack in jax.jit(layout.stack)(tree).items():
    assert isinstance(values[name], np.ndarray)
    of_blocks = np.asarray(stack).reshape(stack.shape[0], -1)
    np.testing.assert_array_equal(
      of_blocks, np.broadcast_to(values[name][:, None], of_blocks.shape)
    )


def test_without_cuts_a_sum_over_slices_costs_nothing(mesh):
  layout = blocks.layout(numbered(), AXES, mesh=mesh)
  values = {name: jnp.ones(bucket.padded) for name, bucket in layout.buckets.items()}
  assert layout.sum_over_slices(values) is values


def test_each_device_sees_its_own_blocks_without_communication(mesh):
  tree = numbered()
  layout = blocks.layout(tree, AXES, mesh=mesh, block_size=4)
  seen = {}

  def on_a_device(stacks, common):
    seen.update({name: x.shape for name, x in stacks.items()}, common=common["table"].shape)
    device = sum(
      jax.lax.axis_index(name) * size for name, size in zip(mesh.axis_names, (4, 2, 1), strict=True)
    )
    return {
      name: (x + common["table"].sum(), jnp.full(x.shape[0], device)) for name, x in stacks.items()
    }

  local = jax.jit(layout.on_each_device(on_a_device))
  stacks, common = jax.jit(layout.stack)(tree), {"table": jnp.arange(3.0)}
  for name, (shifted, device) in local(stacks, common).items():
    share = layout.buckets[name].padded // 8
    assert seen[name] == (share, *layout.buckets[name].shape)
    np.testing.assert_array_equal(device, np.repeat(np.arange(8), share))
    np.testing.assert_array_equal(shifted, np.asarray(stacks[name]) + 3)
    for stack in (stacks[name], shifted):
      # The n-th device of the mesh holds the n-th share.
      holders = {
        shard.device: shard.index[0].indices(stack.shape[0])[:2]
        for shard in stack.addressable_shards
      }
      assert holders == {
        device: (n * share, n * share + share) for n, device in enumerate(mesh.devices.ravel())
      }
  assert seen["common"] == (3,), "what all have in common is whole"
  program = local.lower(stacks, common).compile().as_text()
  assert not [kind for kind in ("all-", "collective-", "reduce-scatter") if kind in program]


def test_on_one_device_it_is_the_function_itself():
  for grid in (None, make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])):
    assert blocks.layout(numbered(), AXES, mesh=grid).on_each_device(min) is min


def zeros(layout):
  return {
    name: bucket.zeros(*bucket.shape, dtype=layout.dtype) for name, bucket in layout.buckets.items()
  }


def test_dtypes(mesh):
  """Stacks are float32 at least, but travel as they came; what comes back has the dtypes of what it
  is for."""
  tree = {
    "half": jnp.ones((3, 4), jnp.bfloat16),
    "single": jnp.ones((4, 3)),
    "vector": jnp.ones(4, jnp.bfloat16),
  }
  layout = blocks.layout(tree, mesh=mesh)
  assert layout.dtype == jnp.float32
  program = jax.make_jaxpr(layout.stack)(tree)
  assert {
    str(eqn.invars[0].aval.dtype)
    for eqn in program.eqns
    if eqn.primitive.name == "sharding_constraint"
  } == {"float32", "bfloat16"}
  stacks = jax.jit(layout.stack)(tree)
  assert {x.dtype for x in stacks.values()} == {jnp.dtype("float32")}
  assert jax.tree.map(jnp.shape, zeros(layout)) == {"3x4": (8, 3, 4), "4": (8, 4)}
  back = layout.unstack(stacks, tree)
  assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, tree)
  with jax.enable_x64(True):
    wide = blocks.layout({"w": jnp.zeros((2, 3), jnp.float64), "b": jnp.zeros(3)})
    assert wide.dtype == jnp.float64
    assert {x.dtype for x in zeros(wide).values()} == {jnp.dtype("float64")}
    exact = {"w": jnp.full((2, 3), 1 / 3, jnp.float64), "b": jnp.ones(3)}
    np.testing.assert_array_equal(wide.unstack(wide.stack(exact), exact)["w"], 1 / 3)


def test_masked_leaves_have_no_blocks(maybe_mesh):
  tree = {**numbered(), "cut": optax.MaskedNode(), "gain": optax.MaskedNode()}
  layout = blocks.layout(tree, AXES, mesh=maybe_mesh, block_size=4)
  back = jax.jit(lambda tree: layout.unstack(layout.stack(tree), tree))(tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)
  assert blocks.layout({"w": optax.MaskedNode()}, mesh=maybe_mesh).buckets == {}


def test_only_the_field_of_that_name_holds_blocks():
  State = collections.namedtuple("State", ["count", "blocks"])
  state = State(0, {"3x5": 1, "blocks": 2})
  tree = {"inner": (state, {"blocks": {"kernel": 3}})}
  found = {
    leaf: blocks.belongs_to_blocks(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert found == {0: False, 1: True, 2: True, 3: False}
