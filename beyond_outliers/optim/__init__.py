"""Optimizers as optax transformations: one table, and `build`, which gives each group its row."""

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

# (learning_rate, *, axes=None, mesh=None, **hyperparameters) -> optax.GradientTransformation, on
# any pytree. axes: a tree, or params -> tree, of Axes. Without it the last two axes of a leaf are
# (fan-in, fan-out), the rest batch. mesh: over whose devices blocks of state are dealt (blocks.py);
# None: all on one.
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
  """Transformation of a run's parameters, with what the trainer logs and shards by."""

  tx: optax.GradientTransformation
  labels: Any  # a tree like the parameters of group labels
  schedules: Mapping[str, optax.Schedule]  # by group label
  shapes: Any  # a tree like the parameters, abstract
  axes: Any = None  # likewise, of Axes

  def step_metrics(self, opt_state: Any, update: Params) -> Metrics:
    """Metrics of the state and of the change of the parameters that a step made (metrics.py)."""
    return {**self.state_metrics(opt_state), **metrics.of_update(update, self.labels, self.axes)}

  def state_metrics(self, opt_state: Any, update: Params = None) -> Metrics:
    """Metrics of the state alone, which cost nothing extra."""
    del update
    return metrics.of_state(opt_state)

  def state_shardings(self, param_shardings: Any) -> Any:
    """Shardings of the optimizer state, a tree like it.

    What belongs to blocks (under a field `blocks`) is split over the whole mesh along its first
    axis; a leaf that mirrors a parameter is split like it; any other is replicated.

    A leaf mirrors the parameter whose path its own path ends in, if the shapes agree."""
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
  """Optimizer of a run of `num_steps`: each group's row of OPTIMIZERS under a schedule of its own.

  params: arrays or their shapes. axes: a tree like params of `Axes`. mesh: over whose devices
    blocks of state are dealt.
  Errors: ConfigError when a parameter has no group or a group no parameter."""
  labels = groups.labels(params, optimizer.groups)
  used = set(jax.tree.leaves(labels))
  schedules, transforms = {}, {}
  for label, group in optimizer.groups.items():
    if label not in used:
      continue
    hyperparameters = dataclasses.asdict(group.optimizer)
    name, peak = hyperparameters.pop("name"), hyperparameters.pop("learning_rate")
    schedules[label] = SCHEDULES[schedule.name](schedule, peak, num_steps)
    # What is None in the config is left to the optimizer.
    given = {key: value for key, value in hyperparameters.items() if value is not None}
    transforms[label] = OPTIMIZERS[name](schedules[label], axes=axes, mesh=mesh, **given)
  return Optimizer(
    optax.partition(transforms, labels),
    labels,
    schedules,
    jax.eval_shape(lambda tree: tree, params),
    axes,
  )
