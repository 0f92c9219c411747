"""Mesh of devices with three axes, the array axes split along them, and agreement of processes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from beyond_outliers import config
from beyond_outliers.params import path_of
from beyond_outliers.types import Array, Json

Tree = TypeVar("Tree")

# Logical name of an array axis -> mesh axes that split it.
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("layers", None),
  ("embed", "fsdp"),  # parameters' model width; activations name theirs None
  ("heads", "model"),
  ("kv_heads", "model"),
  ("mlp", "model"),
  ("vocab", "model"),
  ("vector", None),
)


def make_mesh(axes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A (data, fsdp, model) mesh over all devices.

  Errors: ConfigError when the axes' product is not the device count."""
  devices = jax.devices() if devices is None else devices
  sizes = {"data": axes.data, "fsdp": axes.fsdp, "model": axes.model}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise config.ConfigError(
      f"mesh = {axes}: the axes' product must be the number of devices, {len(devices)}"
    )
  # jax's default axis type is Explicit, on which linen's logical partitioning fails.
  types = (AxisType.Auto,) * 3
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)
  # Slices of TPUs are joined by a slower network: only the data axis crosses it.
  if sizes["data"] % slices:
    raise config.ConfigError(
      f"mesh.data = {sizes['data']}: must be a multiple of the number of slices, {slices}"
    )
  within = (sizes["data"] // slices, sizes["fsdp"], sizes["model"])
  grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
  return jax.sharding.Mesh(grid, tuple(sizes), axis_types=types)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh):
  """Context in which all that is traced sees the mesh and the rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings for abstract parameters with logical axis names (`nn.Partitioned` boxes).

  Errors: ConfigError naming the parameter when a mesh axis does not divide the array axis that it
    splits."""
  specs = nn.get_partition_spec(boxed)
  tree = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  shapes = jax.eval_shape(nn.unbox, boxed)  # traced, so that it may happen inside `use`
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
  """ShapeDtypeStructs that say where each array lives."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch are split over data and fsdp; each model group sees the same rows."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: jax.sharding.Mesh, field: str, rows: int) -> None:
  """Refusal of a batch of `rows` that the mesh does not divide. Errors: ConfigError."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % ways:
    raise config.ConfigError(
      f"{field} = {rows}: must be a multiple of mesh.data · mesh.fsdp = {ways}"
    )


def share_of_rows(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, int]:
  """(index, count): this process's devices hold the index-th of `count` equal shares of a batch.

  A share is consecutive rows.

  Processes that a model axis spans hold the same run. Errors: ConfigError when the devices' rows
  are not such a run."""
  indices: Any = batch_sharding(mesh).addressable_devices_indices_map((rows,))
  held = sorted({row for (part,) in indices.values() for row in range(*part.indices(rows))})
  if held != list(range(held[0], held[0] + len(held))) or rows % len(held) or held[0] % len(held):
    raise config.ConfigError(
      f"mesh = {dict(mesh.shape)}: the devices of process {jax.process_index()} hold rows that are "
      "no equal share of the batch; make mesh.model, or the devices of a process, divide the other"
    )
  return held[0] // len(held), rows // len(held)


def put_batch(batch: Tree, mesh: jax.sharding.Mesh, rows: int) -> Tree:
  """Global arrays of a batch of `rows`: this process's share in numpy in, [rows, L] split over the
  mesh out. A Batch, or any tree of arrays by rows."""
  sharding = batch_sharding(mesh)

  def put(array: Array) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

  return jax.tree.map(put, batch)


def from_first(text: str) -> str:
  """Process 0's text (its first 1024 bytes) on every process, all of which call this."""
  if jax.process_count() == 1:
    return text
  buffer, encoded = np.zeros(1024, np.uint8), np.frombuffer(text.encode()[:1024], np.uint8)
  buffer[: encoded.size] = encoded
  return bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0").decode(errors="replace")


def on_any_process(condition: bool) -> bool:
  """True on every process if the condition holds on one of them; all call this."""
  if jax.process_count() == 1:
    return condition
  return bool(multihost_utils.process_allgather(np.array(condition)).any())


def merged_over_processes(mine: Json) -> Json:
  """One dictionary of every process's, whole on each of them; dictionaries in it are merged too."""
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
