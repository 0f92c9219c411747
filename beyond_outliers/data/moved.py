"""Datasets of runs, found again where they were moved together with the run."""

from __future__ import annotations

import os
import pathlib

from beyond_outliers import data
from beyond_outliers.errors import DataError
from beyond_outliers.types import Json, PathLike


def find_dataset(recorded: Json, workdir: PathLike) -> data.Dataset:
  """The dataset that a manifest records, recognized by its fingerprint: at the recorded path, or at
  the path's tail below the workdir or a folder above it. Errors: DataError."""
  path = recorded["directory"]
  *_, parent, name = ("", *os.path.normpath(path).split(os.sep))
  tails = dict.fromkeys([os.path.join(parent, name), name] if os.path.isabs(path) else [path, name])
  moved = [
    os.path.join(folder, tail)
    for folder in (workdir, *pathlib.Path(workdir).parents)
    for tail in tails
  ]
  others = []
  for place in dict.fromkeys([os.path.abspath(path), *moved]):
    if os.path.isfile(os.path.join(place, "meta.json")):
      try:
        found = data.open(place)
      except DataError as error:
        others.append(str(error))
        continue
      if found.fingerprint == recorded["fingerprint"]:
        return found
      others.append(f"{place} holds data {found.fingerprint[:12]}")
  raise DataError(
    "; ".join(
      [
        f"{workdir}: the run was trained on data {recorded['fingerprint'][:12]}, which are neither "
        f"at {os.path.abspath(path)} nor at {' or '.join(tails)} in that folder or one above it",
        *others,
        "restore them, or give the folder of other data (evaluate --data)",
      ]
    )
  )
