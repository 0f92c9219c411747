"""Optimizers as optax transformations: a table of them, and `build`, which gives each parameter
group its row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from beyond_outliers import config
from beyond_outliers.optim import blocks, groups, metrics
from beyond_outliers.optim.adamw import adamw
from beyond_outliers.optim.muon import muon, scale_by_muon
from beyond_outliers.optim.psgd import psgd, scale_by_psgd
from beyond_outliers.optim.schedules import SCHEDULES
from beyond_outliers.optim.scion import scale_by_scion, scion
from beyond_outliers.optim.shampoo import scale_by_shampoo, shampoo
from beyond_outliers.optim.soap import scale_by_soap, soap
from beyond_outliers.params import Axes, path_of
from beyond_outliers.types import Metrics, Params

__all__ = [
  "OPTIMIZERS",
  "SCHEDULES",
  "Axes",
  "Optimizer",
  "adamw",
  "build",
  "muon",
  "psgd",
  "scale_by_muon",
  "scale_by_psgd",
  "scale_by_scion",
  "scale_by_shampoo",
  "scale_by_soap",
  "scion",
  "shampoo",
  "soap",
]

# (learning_rate, *, axes=None, mesh=None, **hyperparameters) -> optax.GradientTransformation, for
# any pytree. axes: a tree of Axes, or a function params -> tree; without it the last two axes of a
# leaf are (fan-in, fan-out) and the rest batch. mesh: the blocks of the state are distributed over
# its devices (blocks.py); None: one device holds them all.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": adamw,
  "muon": muon,
  "psgd": psgd,
  "scion": scion,
  "shampoo": shampoo,
  "soap": soap,
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A run's optax transformation, and what the trainer needs to log it and shard its state."""

  tx: optax.GradientTransformation
  labels: Any  # group labels, as a tree like the parameters
  schedules: Mapping[str, optax.Schedule]  # by group label
  shapes: Any  # shapes and types of the parameters, as a tree like them
  axes: Any = None  # Axes of the parameters, as a tree like them

  def step_metrics(self, opt_state: Any, update: Params) -> Metrics:
    """Metrics of the state and of a step's change of the parameters (metrics.py)."""
    return {**self.state_metrics(opt_state), **metrics.of_update(update, self.labels, self.axes)}

  def state_metrics(self, opt_state: Any, update: Params = None) -> Metrics:
    """Metrics of the state alone, which cost nothing extra."""
    del update
    return metrics.of_state(opt_state)

  def state_shardings(self, param_shardings: Any) -> Any:
    """Shardings of the optimizer state, as a tree like it.

    A leaf under a field `blocks` is split along its first axis over the whole mesh, one that
    mirrors a parameter is split like the parameter, and any other is replicated.

    A leaf mirrors a parameter if its path ends in the parameter's path and the shapes agree."""
    shapes, shardings = jax.tree_util.tree_leaves_with_path(self.shapes), param_shardings
    by_path = {
      path_of(path): (leaf.shape, sharding)
      for (path, leaf), sharding in zip(shapes, jax.tree.leaves(shardings), strict=True)
    }
    mesh = jax.tree.leaves(shardings)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_block = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def sharding_of(key_path, leaf):
      if blocks.belongs_to_blocks(key_path):
        return by_block
      for start in range(len(key_path)):
        shape, sharding = by_path.get(path_of(key_path[start:]), (None, None))
        if shape == leaf.shape:
          return sharding
      return everywhere

    return jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(self.tx.init, self.shapes))


def build(
  optimizer: config.OptimizerGroups,
  params: Params,
  num_steps: int,
  *,
  schedule: config.Schedule,
  axes: Any = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Optimizer:
  """The optimizer of a run of `num_steps`: for each group its row of OPTIMIZERS and its schedule.

  params: arrays or their shapes. axes: `Axes` as a tree like params. mesh: the devices over which
    the blocks of the state are distributed.
  Errors: ConfigError when a parameter has no group, or a group that isn't optional no parameter."""
  labels = groups.labels(params, optimizer.groups)
  used = set(jax.tree.leaves(labels))
  schedules, transforms = {}, {}
  for label, group in optimizer.groups.items():
    if label not in used:
      continue
    hyperparameters = dataclasses.asdict(group.optimizer)
    name, peak = hyperparameters.pop("name"), hyperparameters.pop("learning_rate")
    schedules[label] = SCHEDULES[schedule.name](schedule, peak, num_steps)
    # None in the config leaves the value to the optimizer.
    given = {key: value for key, value in hyperparameters.items() if value is not None}
    transforms[label] = OPTIMIZERS[name](schedules[label], axes=axes, mesh=mesh, **given)
  return Optimizer(
    optax.partition(transforms, labels),
    labels,
    schedules,
    jax.eval_shape(lambda tree: tree, params),
    axes,
  )
