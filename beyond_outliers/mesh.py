"""Devices in a mesh of three axes, and which array axis is split along which: the one place that knows both."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from beyond_outliers import config

# Logical name of an array axis -> mesh axes that split it.
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("layers", None),
  ("embed", "fsdp"),           # parameters' model width; activations name theirs None
  ("heads", "model"),
  ("kv_heads", "model"),
  ("mlp", "model"),
  ("vocab", "model"),
  ("vector", None),
)


class Axes(NamedTuple):
  """What each axis of a parameter is: axis numbers. fan_in and fan_out: matrices; fan_out alone: vectors; neither: scalars."""
  batch: tuple[int, ...] = ()
  fan_in: tuple[int, ...] = ()
  fan_out: tuple[int, ...] = ()


def make_mesh(axes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A (data, fsdp, model) mesh over all devices. Errors: ConfigError when the axes' product is not the device count."""
  devices = jax.devices() if devices is None else devices
  sizes = {"data": axes.data, "fsdp": axes.fsdp, "model": axes.model}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise config.ConfigError(f"mesh = {axes}: the axes' product must be the number of devices, {len(devices)}")
  # jax's default axis type is Explicit, on which linen's logical partitioning fails.
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh):
  """Everything traced inside sees the mesh and the rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings for a tree of abstract parameters that carry logical axis names (`nn.Partitioned` boxes).

  Errors: ConfigError naming the parameter when a mesh axis does not divide the array axis that it splits."""
  specs = nn.get_partition_spec(boxed)
  tree = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  shapes = nn.unbox(boxed)
  for (path, sharding), leaf in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shapes), strict=True):
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise config.ConfigError(f"mesh = {dict(mesh.shape)}: parameter {name} of shape {leaf.shape} cannot be split as "
                               f"{sharding.spec}; choose mesh axes that divide it") from None
  return tree


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch are split over data and fsdp; each model group sees the same rows."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: jax.sharding.Mesh, field: str, rows: int) -> None:
  """Errors: ConfigError when the mesh does not divide a batch of `rows`."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % ways:
    raise config.ConfigError(f"{field} = {rows}: must be a multiple of mesh.data · mesh.fsdp = {ways}")


def put_batch(batch: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch as global arrays: [B/processes, L] numpy in, [B, L] split over the mesh out."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
