"""Optimizers as optax transformations: one table, and `build`, which gives every parameter group its own."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from beyond_outliers import config
from beyond_outliers.mesh import Axes, path_of
from beyond_outliers.optim import groups
from beyond_outliers.optim.adamw import adamw
from beyond_outliers.optim.schedules import SCHEDULES

__all__ = ["OPTIMIZERS", "SCHEDULES", "Axes", "Optimizer", "adamw", "build", "path_of"]

# (learning_rate, *, axes=None, **hyperparameters) -> optax.GradientTransformation, on any pytree.
# axes: a tree, or params -> tree, of Axes. Without it the last two axes of a leaf are (fan-in, fan-out), the rest batch.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": adamw,
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """What `build` returns: the transformation, and what the trainer logs and shards by."""
  tx: optax.GradientTransformation
  labels: Any                                   # a tree like the parameters of group labels
  schedules: Mapping[str, optax.Schedule]       # by group label
  shapes: Any                                   # a tree like the parameters, abstract

  def state_shardings(self, param_shardings: Any) -> Any:
    """A tree like the optimizer state: a leaf that mirrors a parameter is split like it, any other is replicated.

    A leaf mirrors the parameter whose path its own path ends in, if the shapes agree."""
    by_path = {path_of(path): (leaf.shape, sharding) for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(self.shapes), jax.tree.leaves(param_shardings), strict=True)}
    everywhere = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())

    def sharding_of(key_path, leaf):
      for start in range(len(key_path)):
        shape, sharding = by_path.get(path_of(key_path[start:]), (None, None))
        if shape == leaf.shape:
          return sharding
      return everywhere
    return jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(self.tx.init, self.shapes))


def build(optimizer: config.Optimizer, params: Any, num_steps: int, *, schedule: config.Schedule, axes: Any = None) -> Optimizer:
  """The optimizer of a run of `num_steps`: each group's own row of OPTIMIZERS under its own learning-rate schedule.

  params: arrays or their shapes. axes: a tree like params of `Axes`.
  Errors: ConfigError when a parameter has no group or a group no parameter."""
  labels = groups.labels(params, optimizer.groups)
  schedules, transforms = {}, {}
  for label, group in optimizer.groups.items():
    hyperparameters = dataclasses.asdict(group.optimizer)
    name, peak = hyperparameters.pop("name"), hyperparameters.pop("learning_rate")
    schedules[label] = SCHEDULES[schedule.name](schedule, peak, num_steps)
    transforms[label] = OPTIMIZERS[name](schedules[label], axes=_only(axes, labels, label), **hyperparameters)
  return Optimizer(optax.partition(transforms, labels), labels, schedules, jax.eval_shape(lambda tree: tree, params))


def _only(axes: Any, labels: Any, label: str) -> Any:
  """The axes of one group's parameters, masked like the parameters that its transformation will see."""
  if axes is None:
    return None
  is_axes = lambda x: isinstance(x, Axes)
  return jax.tree.map(lambda a, name: a if name == label else optax.MaskedNode(), axes, labels, is_leaf=is_axes)
