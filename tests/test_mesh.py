"""The mesh: its axes' sizes, what cannot be split, and which device holds which rows."""

import dataclasses
import itertools
import types

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


@dataclasses.dataclass(frozen=True)
class Device:
  """A device of some cluster, as JAX describes one; None: of no slice."""

  id: int
  process_index: int
  slice_index: int | None = None
  platform: str = "gpu"
  device_kind: str = "a device"
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0


def cluster(slices, processes, devices, platform="gpu"):
  """`slices` of so many processes, with so many devices each."""
  places = itertools.product(range(slices or 1), range(processes), range(devices))
  return [
    Device(number, part * processes + process, part if slices else None, platform)
    for number, (part, process, _) in enumerate(places)
  ]


def grid(axes, devices):
  """Devices at the mesh's places."""
  return mesh.make_mesh(config.Mesh(*axes), devices).devices


@pytest.mark.parametrize("dcn_data", [1, -1, 2])
@pytest.mark.parametrize("devices", [cluster(2, 2, 4), cluster(2, 1, 8)])
def test_only_the_data_axis_crosses_slices(dcn_data, devices):
  """Of devices in any order."""
  placed = grid((-1, 2, 2, dcn_data), devices[::-1])
  assert placed.shape == (4, 2, 2)
  assert [{each.slice_index for each in part.flat} for part in placed] == [{0}, {0}, {1}, {1}]


def test_hosts_are_slices_of_devices_that_have_none():
  devices = cluster(None, 2, 4)
  mixed = devices[::2] + devices[1::2]
  placed = grid((2, 4, 1, 2), mixed)
  assert [{each.process_index for each in part.flat} for part in placed] == [{0}, {1}]
  assert (grid((2, 4, 1, -1), mixed) == placed).all()


def test_processes_of_unlike_numbers_of_devices_are_refused(monkeypatch):
  """Among which JAX broadcasts nothing."""
  monkeypatch.setattr(jax, "devices", lambda: [*cluster(None, 2, 4), Device(9, 1)])
  with pytest.raises(config.ConfigError, match="4 of process 0, 5 of process 1"):
    mesh.make_mesh(config.Mesh(-1, 9, 1))


def test_other_axes_cross_slices_where_the_data_axis_does_not_go_over_them():
  devices = cluster(2, 1, 8, "tpu")
  assert grid((1, -1, 1, 1), devices[::-1])[0, ::8, 0].tolist() == [devices[7], devices[15]]
  assert grid((3, 1, 1, 1), cluster(2, 1, 8)[6:9]).shape == (3, 1, 1), "slices of 2 and 1"


@pytest.mark.parametrize(
  "axes, devices, reason",
  [
    ((-1, 1, 1, 3), cluster(2, 1, 8), "mesh.dcn_data = 3: the devices lie on 2 slices"),
    ((-1, 1, 1, 2), cluster(1, 2, 4), "mesh.dcn_data = 2: the devices lie on 1 slices"),
    ((-1, 1, 1, 2), cluster(None, 2, 4, "tpu"), "mesh.dcn_data = 2: the devices lie on 1 slices"),
    (
      (1, -1, 1, -1),
      cluster(2, 1, 8),
      "mesh.data = 1: must be a multiple of the number of slices, 2",
    ),
    ((-1, 1, 1, 2), cluster(2, 1, 8)[4:], "mesh.dcn_data = 2: slices of 4 and 8 devices"),
  ],
)
def test_slices_that_cannot_be_had_are_refused(axes, devices, reason):
  with pytest.raises(config.ConfigError) as refusal:
    grid(axes, devices)
  assert str(refusal.value).startswith(reason)


def torus(kind, *lengths):
  """A slice of TPUs whose hosts have two by two chips each."""
  found = []
  for z, y, x in itertools.product(*map(range, lengths[::-1])):
    host = (z * lengths[1] // 2 + y // 2) * lengths[0] // 2 + x // 2
    found.append(Device(len(found), host, None, "tpu", kind, (x, y, z)))
  return found


@pytest.mark.parametrize(
  "axes", [(-1, 1, 1), (-1, 8, 1), (1, -1, 1), (-1, 4, 2), (-1, 16, 4), (-1, 1, 4)]
)
@pytest.mark.parametrize(
  "devices",
  [torus("TPU v5 lite", 16, 16, 1), torus("TPU v5 lite", 4, 4, 1), torus("TPU v5", 4, 4, 4)],
  ids=["v5e-256", "v5e-16", "v5p-128"],
)
def test_every_host_of_a_torus_has_a_share_of_any_mesh(monkeypatch, axes, devices):
  """Its chips are not neighbours in a mesh whose neighbours are so on the torus."""
  if len(devices) % (axes[1] * axes[2]):
    return
  made = grid(axes, devices)
  layout = types.SimpleNamespace(
    devices=made, shape=dict(zip(("data", "fsdp", "model"), made.shape, strict=True))
  )
  found = set()
  for host in {device.process_index for device in devices}:
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    found.add(mesh.share_of_rows(layout))
  (count,) = {count for _, count in found}
  assert {index for index, _ in found} == set(range(count))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_holds_all_rows(sizes):
  assert mesh.share_of_rows(mesh.make_mesh(config.Mesh(*sizes))) == (0, 1)


def laid_out(processes, model=1):
  """A mesh whose devices are of these processes, in order."""
  devices = np.array([Device(i, process) for i, process in enumerate(processes)])
  return types.SimpleNamespace(
    devices=devices.reshape(-1, 1, model),
    shape={"data": len(devices) // model, "fsdp": 1, "model": model},
  )


@pytest.mark.parametrize(
  "made, shares",
  [
    (laid_out([0, 0, 0, 0, 1, 1, 1, 1]), [(0, 2), (1, 2)]),
    (laid_out([0, 0, 0, 0, 1, 1, 1, 1], model=2), [(0, 2), (1, 2)]),
    (laid_out([0, 1, 0, 1], model=4), [(0, 1), (0, 1)]),  # a model axis that spans both
    # Of a torus: so JAX lays a mesh out on a v5e-16, and a v5p-16.
    (laid_out([0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]), [(i, 4) for i in range(4)]),
    (laid_out([0, 2, 0, 2, 1, 3, 1, 3]), [(i, 4) for i in (0, 2, 1, 3)]),
  ],
)
def test_a_process_knows_its_share_of_the_rows(monkeypatch, made, shares):
  found = []
  for process in range(len(shares)):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found.append(mesh.share_of_rows(made))
  assert sorted(found) == sorted(shares) and found[0] == (0, shares[0][1])


@pytest.mark.parametrize(
  "made", [laid_out([0, 0, 0, 1]), laid_out([0, 0, 0, 1, 1, 1], model=2)], ids=["sizes", "overlap"]
)
def test_rows_that_are_no_equal_share_are_refused(made):
  with pytest.raises(config.ConfigError, match="not hold an equal share"):
    mesh.share_of_rows(made)
