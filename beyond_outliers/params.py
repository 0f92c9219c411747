"""How parameters are addressed: paths in their tree, and what each axis is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Axes(NamedTuple):
  """What each axis of a parameter is: axis numbers. fan_in and fan_out: matrices; fan_out alone:
  vectors; neither: scalars."""

  batch: tuple[int, ...] = ()
  fan_in: tuple[int, ...] = ()
  fan_out: tuple[int, ...] = ()


def path_of(key_path: tuple[Any, ...]) -> str:
  """`layers/attention/q/kernel`: how paths in a tree are written everywhere."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")
