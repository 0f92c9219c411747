"""Trains: python -m beyond_outliers.main --config=configs/adamw.py[:size,key=value,...] [--config.key=value]."""

from __future__ import annotations

import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from beyond_outliers import cli, config, train

EXIT_CODES = {"done": 0, "diverged": 3, "preempted": 42}

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; by default runs/<config>-<size>. The same command resumes."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step, say what it takes, and exit.")
DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  "",
  "Several processes: 'auto' (Slurm, TPU pod, Open MPI, as JAX detects "
  "them) or HOST:PORT,COUNT,INDEX.",
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  c = config.resolve(CONFIG.value)
  if DISTRIBUTED.value == "auto":
    jax.distributed.initialize()
  elif DISTRIBUTED.value:
    parts = DISTRIBUTED.value.split(",")
    if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
      raise config.ConfigError(
        f"--distributed = {DISTRIBUTED.value!r}: expected 'auto' or HOST:PORT,COUNT,INDEX"
      )
    address, count, index = parts
    jax.distributed.initialize(address, int(count), int(index))
  sys.exit(EXIT_CODES[train.run(c, WORKDIR.value or default_workdir(c), dry_run=DRY_RUN.value)])


def default_workdir(c: config.Config) -> str:
  """runs/<name of the config file>-<size>."""
  path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
  return os.path.join("runs", f"{os.path.splitext(os.path.basename(path))[0]}-{c.size}")


if __name__ == "__main__":
  cli.run(main)
