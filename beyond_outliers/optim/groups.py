"""Parameter groups: a parameter is in the first whose regular expression matches its whole path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax

from beyond_outliers import config
from beyond_outliers.params import path_of


def labels(params: Any, groups: Mapping[str, config.Group]) -> Any:
  """Group labels, as a tree like `params`.

  Errors: ConfigError for a parameter without a group, or a group without parameters that isn't
    optional."""

  def label(key_path, _):
    path = path_of(key_path)
    for name, group in groups.items():
      if re.fullmatch(group.paths, path):
        return name
    patterns = {name: group.paths for name, group in groups.items()}
    raise config.ConfigError(
      f"optimizer.groups = {patterns}: no group matches parameter {path!r}; widen one of the paths"
    )

  tree = jax.tree_util.tree_map_with_path(label, params)
  unused = {name for name, group in groups.items() if not group.optional} - set(
    jax.tree.leaves(tree)
  )
  if unused:
    name = sorted(unused)[0]
    raise config.ConfigError(
      f"optimizer.groups.{name}.paths = {groups[name].paths!r}: matches no parameter; fix or drop "
      "it"
    )
  return tree
