"""The mesh of devices with its three axes, how arrays are split along them, and what processes do
together.

How processes join in the first place: processes.py.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from beyond_outliers import config
from beyond_outliers.errors import WorkdirError
from beyond_outliers.params import path_of
from beyond_outliers.types import Array, Json

Tree = TypeVar("Tree")
Plain = TypeVar("Plain")  # a value that JSON can hold

SEEN_SECONDS = 10.0  # how long a slow file system may take to show a new file to all processes

# Logical name of an array axis -> mesh axes that split it.
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("layers", None),
  ("embed", "fsdp"),  # the model width of parameters; activations use None for theirs
  ("heads", "model"),
  ("kv_heads", "model"),
  ("mlp", "model"),
  ("vocab", "model"),
  ("vector", None),
)


def make_mesh(axes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A (data, fsdp, model) mesh over all devices.

  Errors: ConfigError when the axes' product is not the number of devices, the slices do not divide
  the data axis that should cross them, or processes differ in their number of devices."""
  devices = _all_devices() if devices is None else devices
  sizes = {"data": axes.data, "fsdp": axes.fsdp, "model": axes.model}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise config.ConfigError(
      f"mesh = {axes}: the axes' product must be the number of devices, {len(devices)}"
    )
  data, *within = sizes.values()
  slices = _slices(axes.dcn_data, data, devices)
  grids = [_grid((data // len(slices), *within), part) for part in slices]
  # jax.make_mesh's default axis type is Explicit, with which linen's logical partitioning fails.
  return jax.sharding.Mesh(np.concatenate(grids), tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _all_devices() -> Sequence[jax.Device]:
  """All devices. Errors: ConfigError if processes differ in their number of devices, with which JAX
  would not let them agree on anything."""
  devices = jax.devices()
  held = collections.Counter(device.process_index for device in devices)
  few, many = min(held, key=held.__getitem__), max(held, key=held.__getitem__)
  if held[few] != held[many]:
    raise config.ConfigError(
      f"devices: {held[few]} of process {few}, {held[many]} of process {many}; give all processes "
      "of a run the same number"
    )
  return devices


def _slices(
  dcn_data: int, data: int, devices: Sequence[jax.Device]
) -> Sequence[Sequence[jax.Device]]:
  """The devices by slice if the data axis crosses slices; otherwise all as one.

  A slice is a set of devices that a faster network joins than the one between slices: a TPU slice,
  or a host of other devices.
  Errors: ConfigError if dcn_data is impossible."""
  found: dict[Any, list[jax.Device]] = {}
  for device in devices:
    found.setdefault(_slice_of(device, dcn_data), []).append(device)
  slices = [found[key] for key in sorted(found)]
  count, sizes = len(slices), sorted({len(each) for each in slices})
  if dcn_data not in (1, -1, count):
    raise config.ConfigError(
      f"mesh.dcn_data = {dcn_data}: the devices lie on {count} slices, or hosts; expected {count}, "
      "-1 for as many as there are, or 1"
    )
  if len(sizes) == 1 and data % count == 0:
    return slices
  if dcn_data == 1:
    return [[device for each in slices for device in each]]
  if len(sizes) > 1:
    raise config.ConfigError(
      f"mesh.dcn_data = {dcn_data}: slices of {' and '.join(map(str, sizes))} devices; the data "
      "axis can only go over slices of equal size; set it to 1"
    )
  raise config.ConfigError(
    f"mesh.data = {data}: must be a multiple of the number of slices, {count}; or let other axes "
    "cross them, with mesh.dcn_data=1"
  )


def _grid(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices in an order that makes neighbours along an axis neighbours in the network, where JAX
  knows one."""
  if len({getattr(device, "slice_index", None) for device in devices}) > 1:
    return np.array(devices).reshape(shape)  # JAX orders only the devices of one slice
  # JAX refuses a mesh whose axes don't consist of whole torus axes, unless it may split those.
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slice_of(device: jax.Device, dcn_data: int) -> int:
  """Number of a device's slice. Devices that have none get their process's if slices are wanted."""
  known = getattr(device, "slice_index", None)
  if known is None and dcn_data != 1 and device.platform != "tpu":
    return device.process_index
  return known or 0


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh):
  """Context in which traced code sees the mesh and RULES."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings for abstract parameters with logical axis names (`nn.Partitioned` boxes).

  Errors: ConfigError naming the parameter when a mesh axis does not divide the array axis that it
    splits."""
  specs = nn.get_partition_spec(boxed)
  tree = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  shapes = jax.eval_shape(nn.unbox, boxed)  # traced, so that it also works inside `use`
  for (path, sharding), leaf in zip(
    jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shapes), strict=True
  ):
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError:
      raise config.ConfigError(
        f"mesh = {dict(mesh.shape)}: parameter {path_of(path)} of shape {leaf.shape} cannot be "
        f"split as {sharding.spec}; choose mesh axes that divide it"
      ) from None
  return tree


def placed(shapes: Any, shardings: Any) -> Any:
  """The shapes as ShapeDtypeStructs with these shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding of a batch: rows are split over data and fsdp; along `model`, devices share rows."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: jax.sharding.Mesh, field: str, rows: int) -> None:
  """Refuses a batch of `rows` that the mesh does not divide. Errors: ConfigError."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % ways:
    raise config.ConfigError(
      f"{field} = {rows}: must be a multiple of mesh.data · mesh.fsdp = {ways}"
    )


def share_of_rows(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count): this process's devices hold the index-th of `count` equal shares of a batch.

  Processes that a model axis spans hold the same share. Where a share's rows are in the global
  array follows from the devices' places in the mesh, so they need not be adjacent; nothing computed
  from a batch depends on the order of its rows.
  Errors: ConfigError when the processes' devices do not hold equal shares."""
  held: dict[int, set[int]] = {}
  for place, group in enumerate(mesh.devices.reshape(-1, mesh.shape["model"])):
    for device in group:
      held.setdefault(device.process_index, set()).add(place)
  shares = sorted({tuple(sorted(places)) for places in held.values()})
  mine = tuple(sorted(held[jax.process_index()]))
  overlap = sum(map(len, shares)) != len(set().union(*shares))
  if overlap or len({len(share) for share in shares}) > 1:
    raise config.ConfigError(
      f"mesh = {dict(mesh.shape)}: the devices of process {jax.process_index()} do not hold an "
      "equal share of the batch's rows; choose mesh.model and the devices of a process so that one "
      "divides the other"
    )
  return shares.index(mine), len(shares)


def put_batch(batch: Tree, mesh: jax.sharding.Mesh, rows: int) -> Tree:
  """The batch of `rows` as global arrays [rows, L], split over the mesh.

  batch: a Batch, or any tree of numpy arrays with rows first, holding this process's share, or on
    every process all rows."""
  sharding = batch_sharding(mesh)

  def put(array: Array) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

  return jax.tree.map(put, batch)


def replicate(tree: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """The tree with its arrays whole on every device. All processes must give the same values."""
  if jax.process_count() == 1:
    return jax.device_put(tree, replicated(mesh))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x), x.shape), tree
  )


def from_first(value: Plain) -> Plain:
  """Process 0's value, which JSON must be able to hold, on every process; all must call this."""
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
  # Rounded up to few sizes, each of which is compiled once.
  whole = np.zeros(max(1024, 1 << (length - 1).bit_length()), np.uint8)
  whole[: min(text.size, length)] = text[:length]
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(whole))[:length])


def found_by_first(find: Callable[[], Plain]) -> Plain:
  """What process 0 finds, as in a folder that changes, on every process; all must call this."""
  if jax.process_count() == 1:
    return find()
  found: Any = find() if jax.process_index() == 0 else None
  return from_first(found)


def on_any_process(condition: bool) -> bool:
  """True on every process if the condition holds on any of them; all must call this."""
  if jax.process_count() == 1:
    return condition
  return bool(multihost_utils.process_allgather(np.array(condition)).any())


def check_shared(folder: Any, remedy: str) -> None:
  """Refuses a path that is not the same folder on all processes: the others would wait forever for
  what the first writes there. All must call this.

  folder: a path of pathlib or a similar library. Errors: WorkdirError."""
  if jax.process_count() == 1:
    return
  # A new name, which no file system's client can have cached as missing.
  token = folder / from_first(f".seen.{os.getpid()}-{secrets.randbits(64)}.tmp")
  if jax.process_index() == 0:
    token.touch()
  from_first("written")
  deadline = time.monotonic() + SEEN_SECONDS
  while not (seen := token.exists()) and time.monotonic() < deadline:
    time.sleep(0.1)
  missed = on_any_process(not seen)
  if jax.process_index() == 0:
    token.unlink()
  if missed:
    raise WorkdirError(
      f"{folder} is not the same folder on all processes: one does not see what process 0 writes "
      f"there; {remedy}"
    )


def merged_over_processes(mine: Json) -> Json:
  """The processes' dictionaries merged into one, on all of them; dictionaries one level down are
  merged too. All must call this."""
  if jax.process_count() == 1:
    return mine
  text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(text.size))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: text.size] = text
  whole: Json = {}
  for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True):
    for key, value in json.loads(bytes(row[:length])).items():
      whole[key] = {**whole[key], **value} if isinstance(value, dict) and key in whole else value
  return whole
