"""The manifest of a run: when, where and how it began, and with which code, devices and data."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from beyond_outliers import config, data
from beyond_outliers import workdir as workdir_lib
from beyond_outliers.config.sums import digest
from beyond_outliers.errors import WorkdirError
from beyond_outliers.mesh import jax_settings
from beyond_outliers.model import transformer
from beyond_outliers.train.initialize import Start, check_parent
from beyond_outliers.train.program import Program
from beyond_outliers.train.run_hooks import fingerprints
from beyond_outliers.types import Json


def of_start(
  program: Program,
  dataset: data.Dataset,
  workdir: workdir_lib.Workdir,
  start: Start,
  say: Callable[[str], None],
) -> Json:
  """The first start's manifest; every later start of the workdir is listed under `resumed`.

  Errors: WorkdirError if the workdir's manifest has other data, belongs to another run than the
    checkpoint, or names another parent or other JAX settings."""
  recorded = (start.record or {}).get("manifest")  # the checkpoint's copy
  parent = {"warm_start": start.parent} if start.parent else {}
  now = workdir_lib.manifest(
    {
      "parameters": transformer.count(program.state.params),
      "data": {"directory": os.path.abspath(dataset.directory), **fingerprints(dataset)},
      **parent,
    }
  )
  described = {"config": digest(config.to_dict(program.config))}  # of config.json
  before = workdir.read("manifest.json")
  if before is None and recorded:
    say(f"{workdir.path / 'manifest.json'} is gone; it is restored from the checkpoint")
    before = recorded
  if before is None:  # a random id, since two runs may begin in the same second
    return {"id": secrets.token_hex(8), **now, **described, "resumed": []}
  if before["data"]["fingerprint"] != now["data"]["fingerprint"]:
    raise WorkdirError(
      f"{workdir.path}: the run was trained on data {before['data']['fingerprint']}, and these are "
      f"{now['data']['fingerprint']} ({dataset.directory}); restore the former, or start a new "
      "workdir"
    )
  if recorded and workdir_lib.identity_of(recorded) != workdir_lib.identity_of(before):
    raise WorkdirError(
      f"{workdir.path / 'manifest.json'} belongs to another run than the newest checkpoint; "
      f"{workdir_lib.RESTORE}"
    )
  jax_settings.check_recorded(before)
  if start.parent and "warm_start" in before:  # not in manifests of earlier versions
    check_parent(before["warm_start"], start.parent, program.config.warm_start)
  for difference in jax_settings.other_compiler_flags(before):
    say(difference)
  return {**before, **described, "resumed": [*before.get("resumed", []), now]}
