"""What was recorded for a sweep: values that an analysis found, and the runs in its workdirs."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterable

from beyond_outliers import config
from beyond_outliers.config import sweeps
from beyond_outliers.config.files import read_json
from beyond_outliers.config.sizes import shape_of
from beyond_outliers.errors import ConfigError, WorkdirError


def found(file: str, path: str, argument: str) -> sweeps.Overrides:
  """Overrides that `file` has for the config's optimizer. Errors: ConfigError if they are for
  another size or shape of model, or the optimizer is missing."""
  remedy = "give what analysis --overrides=FILE wrote"
  try:
    saved = read_json(file, ConfigError, remedy, {"size": str, "overrides": dict})
  except (FileNotFoundError, NotADirectoryError):
    raise ConfigError(f"--overrides={file}: there is no such file; {remedy}") from None
  c = runpy.run_path(path)["get_config"](argument)
  if saved["size"] != c.size:
    raise ConfigError(
      f"--overrides={file}: found at size {saved['size']}, and this is {c.size}; tune at that size"
    )
  shape = shape_of(c.model)
  for key, was in saved.get("model", {}).items():  # missing from files of earlier versions
    if shape.get(key) != was:
      raise ConfigError(
        f"--overrides={file}: found with model.{key} = {was!r}, and this has {shape.get(key)!r}; "
        "tune that model"
      )
  if c.optimizer.name not in saved["overrides"]:
    raise ConfigError(
      f"--overrides={file}: nothing about {c.optimizer.name}; "
      f"it has {', '.join(saved['overrides'])}"
    )
  return saved["overrides"][c.optimizer.name]


def check_same_run(workdir: str, path: str, argument: str, values: sweeps.Overrides) -> None:
  """Refuses a workdir whose run differs from the sweep's, as `main` would; but `main` is not
  started for a run that has ended. Errors: ConfigError with the differing keys."""
  try:
    saved = read_json(os.path.join(workdir, "config.json"), WorkdirError, "")
    old = config.resolve(saved)
  except (FileNotFoundError, NotADirectoryError, ConfigError, WorkdirError):
    return  # damage is reported by the run itself
  new = config.resolve(config.override(runpy.run_path(path)["get_config"](argument), values))
  if old != new:
    from beyond_outliers.train import initialize  # imports all of JAX

    initialize.check_same_run(old, new, workdir)
    if old.data.path != new.data.path:  # both may lead to the same text
      print(
        f"{workdir}: its run read data.path = {old.data.path!r}, not {new.data.path!r}; whether "
        "both hold the same is checked when the run resumes, and not once it is done",
        file=sys.stderr,
      )


def check_settings(workdirs: Iterable[str]) -> None:
  """Refuses a workdir whose run was trained under other JAX settings than this process has, which
  jobs started here inherit, as `main` would; but `main` is not started for a run that has ended.
  Errors: ConfigError with the setting and both values."""
  for workdir in workdirs:
    try:
      saved = read_json(os.path.join(workdir, "manifest.json"), WorkdirError, "")
    except (FileNotFoundError, NotADirectoryError, WorkdirError):
      continue  # damage is reported by the run itself
    from beyond_outliers.mesh import jax_settings  # imports all of JAX

    try:
      jax_settings.check_recorded(saved)
    except WorkdirError as error:
      raise ConfigError(f"{workdir}: {error}") from None
