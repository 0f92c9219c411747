"""The mesh: its axes' sizes, what cannot be split, and which device holds which rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from beyond_outliers import config, mesh


@pytest.mark.parametrize(
  "axes, shape",
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((1, -1, 2), (1, 4, 2)),
    ((2, 2, 2), (2, 2, 2)),
    ((2, 4, -1), (2, 4, 1)),
  ],
)
def test_minus_one_takes_all_devices_that_remain(axes, shape):
  made = mesh.make_mesh(config.Mesh(*axes))
  assert dict(made.shape) == dict(zip(("data", "fsdp", "model"), shape, strict=True))
  assert made.axis_types == (AxisType.Auto,) * 3, (
    "linen's logical partitioning fails on Explicit axes"
  )


@pytest.mark.parametrize("axes", [(2, 2, 1), (3, 1, 1), (-1, 3, 1), (-1, 16, 1), (16, 1, 1)])
def test_axes_that_are_not_all_devices_are_refused(axes):
  with pytest.raises(config.ConfigError, match=rf"mesh = .*fsdp={axes[1]}.*number of devices, 8"):
    mesh.make_mesh(config.Mesh(*axes))


def test_a_mesh_over_some_devices():
  made = mesh.make_mesh(config.Mesh(1, -1, 1), devices=jax.devices()[2:5])
  assert made.devices.ravel().tolist() == jax.devices()[2:5]


def boxed(shape, names):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_logical_names_say_how_parameters_are_split():
  made = mesh.make_mesh(config.Mesh(1, 4, 2))
  tree = mesh.shardings(
    {
      "embedding": boxed((64, 16), ("vocab", "embed")),
      "kernel": boxed((3, 16, 10), ("layers", "embed", "mlp")),
      "gain": boxed((16,), ("vector",)),
    },
    made,
  )
  assert {name: sharding.spec for name, sharding in tree.items()} == {
    "embedding": PartitionSpec("model", "fsdp"),
    "kernel": PartitionSpec(None, "fsdp", "model"),
    "gain": PartitionSpec(None),
  }


def test_a_parameter_that_does_not_divide_is_named():
  made = mesh.make_mesh(config.Mesh(1, 4, 2))
  with pytest.raises(
    config.ConfigError,
    match=r"parameter mlp/up/kernel of shape \(6, 10\).*'fsdp'.*choose mesh axes",
  ):
    mesh.shardings({"mlp": {"up": {"kernel": boxed((6, 10), ("embed", "mlp"))}}}, made)


def test_a_batch_that_does_not_divide_is_refused():
  made = mesh.make_mesh(config.Mesh(2, 2, 2))
  mesh.check_batch(made, "eval.batch_size", 12)
  with pytest.raises(config.ConfigError, match=r"eval.batch_size = 6: .* multiple of .* = 4"):
    mesh.check_batch(made, "eval.batch_size", 6)


def test_rows_are_split_over_data_and_fsdp_and_shared_by_a_model_group():
  made = mesh.make_mesh(config.Mesh(2, 2, 2))
  rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  batch = mesh.put_batch({"tokens": rows, "weights": rows.astype(np.float32)}, made, 8)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    "tokens": ((8, 3), "int32"),
    "weights": ((8, 3), "float32"),
  }
  for shard in batch["tokens"].addressable_shards:
    data, fsdp, _ = np.argwhere(made.devices == shard.device)[0]
    first = (2 * data + fsdp) * 2
    np.testing.assert_array_equal(shard.data, rows[first : first + 2])


def test_inside_use_constraints_by_logical_name_reach_the_mesh():
  made = mesh.make_mesh(config.Mesh(2, 2, 2))
  with mesh.use(made):
    x = jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", "mlp")))(jnp.zeros((8, 4)))
  assert x.sharding.spec == PartitionSpec(("data", "fsdp"), "model")
  assert x.addressable_shards[0].data.shape == (2, 2)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_holds_all_rows(sizes):
  assert mesh.share_of_rows(mesh.make_mesh(config.Mesh(*sizes)), 16) == (0, 1)


class Devices:
  """What one of several processes would see of a batch's rows."""

  def __init__(self, *rows):
    self.rows = rows

  def addressable_devices_indices_map(self, shape):
    return {number: (slice(*rows),) for number, rows in enumerate(self.rows)}


@pytest.mark.parametrize(
  "rows, expected",
  [
    ([(8, 10), (10, 12), (12, 14), (14, 16)], (1, 2)),
    ([(4, 8), (4, 8)], (1, 4)),
    ([(0, None)], (0, 1)),
  ],
  ids=str,
)
def test_a_process_knows_its_share_of_the_rows(monkeypatch, rows, expected):
  """Two processes of four devices; a model axis of two; a model axis that spans the processes."""
  monkeypatch.setattr(mesh, "batch_sharding", lambda made: Devices(*rows))
  assert mesh.share_of_rows(mesh.make_mesh(config.Mesh(8, 1, 1)), 16) == expected


def test_rows_that_are_no_equal_share_are_refused(monkeypatch):
  monkeypatch.setattr(mesh, "batch_sharding", lambda made: Devices((0, 4), (8, 12)))
  with pytest.raises(config.ConfigError, match="no equal share"):
    mesh.share_of_rows(mesh.make_mesh(config.Mesh(8, 1, 1)), 16)
