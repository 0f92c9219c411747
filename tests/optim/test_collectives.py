"""A step's communication on eight devices: gradients to their blocks' owners, updates back, and
nothing between."""

import jax
import jax.numpy as jnp
import pytest

from beyond_outliers import config, mesh, optim
from beyond_outliers.bench import hlo
from beyond_outliers.optim import blocks
from beyond_outliers.params import Axes

# As a model's: matrices split in either order, and a cut axis of which a device has whole blocks,
# or parts.
SHAPES = {
  "embedding": (80, 16),
  "gain": (8, 16),
  "down": (8, 32, 16),
  "o": (8, 16, 16),
  "q": (8, 16, 16),
  "up": (8, 16, 32),
}
AXES = {
  "embedding": Axes((), (1,), (0,)),
  "gain": Axes((0,), (), (1,)),
  **dict.fromkeys(("down", "o", "q", "up"), Axes((0,), (1,), (2,))),
}
SPLIT = {
  "embedding": ("model", "fsdp"),
  "down": (None, "model", "fsdp"),
  "o": (None, "model", "fsdp"),
  "q": (None, "fsdp", "model"),
  "up": (None, "fsdp", "model"),
}
TREE = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}

# Arguments, and matrices of each decomposition for a matrix's block and a vector's. SOAP has the
# first step's and the others'.
ROWS = {
  "muon": ({}, {}),
  "shampoo": ({"block_size": 16, "grafting": "adam"}, {"ssyevd": (2, 1)}),
  "soap": ({"block_size": 16}, dict.fromkeys(("ssyevd", "sgeqrf", "sorgqr"), (2, 0))),
}

# An eighth of all parameters.
SHARE = sum(x.size * x.dtype.itemsize for x in TREE.values()) / 8


def put(x, grid, *spec):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(grid, jax.P(*spec)))


def parameters(grid):
  return {name: put(x, grid, *SPLIT.get(name, ())) for name, x in TREE.items()}


def compiled(function, *inputs, like):
  """What each device runs, all branches together. Outputs lie like the inputs `like`."""
  lowered = jax.jit(function, out_shardings=jax.tree.map(lambda x: x.sharding, like)).lower(*inputs)
  return hlo.instructions(lowered.compile().as_text())


def update_of(name, arguments):
  grid = mesh.make_mesh(config.Mesh(2, 2, 2))
  tx = optim.OPTIMIZERS[name](0.1, axes=AXES, mesh=grid, **arguments)
  params = parameters(grid)

  def split(path, x):
    return put(x, grid, *((grid.axis_names,) if blocks.belongs_to_blocks(path) else ()))

  state = jax.tree_util.tree_map_with_path(split, jax.eval_shape(tx.init, params))
  return compiled(tx.update, params, state, params, like=(params, state))


@pytest.mark.parametrize("name", ROWS)
def test_only_gradients_and_updates_travel(name):
  arguments, decompositions = ROWS[name]
  update = update_of(name, arguments)
  moved = [one for one in update if hlo.collective(one)]
  assert not [one.line for one in moved if one.loops], "an iteration that waits for other devices"
  # To the owners and back. A device has a quarter of all gradients, and is to have a quarter of all
  # updates.
  assert 0 < hlo.received(moved) <= 16 * SHARE
  padded = {
    bucket: -(-of.count // 8)
    for bucket, of in blocks.layout(TREE, AXES, block_size=16).buckets.items()
  }
  expected = {
    f"{kernel} 16x16": matrices * padded["16x16"] + vectors * padded["16"]
    for kernel, (matrices, vectors) in decompositions.items()
  }
  assert hlo.decompositions(update) == expected, "each device its own blocks"


@pytest.mark.parametrize(
  "axes, to_owners, back", [((8, 1, 1), 0, 12), ((1, 8, 1), 2, 3), ((2, 2, 2), 8, 10)]
)
def test_what_is_moved_is_of_the_order_of_what_is_owned(axes, to_owners, back):
  """In eighths of all parameters. Along "data" every device has all gradients alike, and is to have
  all updates."""
  grid = mesh.make_mesh(config.Mesh(*axes))
  params, layout = parameters(grid), blocks.layout(TREE, AXES, mesh=grid, block_size=16)
  shapes = jax.eval_shape(layout.stack, TREE)
  stacks = {name: put(x, grid, grid.axis_names) for name, x in shapes.items()}
  in_, out = (
    compiled(layout.stack, params, like=stacks),
    compiled(layout.unstack, stacks, params, like=params),
  )
  assert (hlo.received(in_) <= to_owners * SHARE, hlo.received(out) <= back * SHARE) == (True, True)
