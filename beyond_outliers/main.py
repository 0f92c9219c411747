"""Training: python -m beyond_outliers.main --config=configs/adamw.py[:size,key=value,...].

Any key of the config is also a flag: --config.optimizer.learning_rate=3e-3.
"""

from __future__ import annotations

import os

from absl import app, flags

from beyond_outliers import cli, config, stores
from beyond_outliers.config.cluster import membership

EXIT_CODES = {"done": 0, "diverged": 3, "preempted": cli.STOPPED}

CONFIG = cli.config_flag()
WORKDIR = cli.path_flag(
  "workdir",
  None,
  "Folder of the run, s3://BUCKET/PATH or gs://BUCKET/PATH; by default runs/<config>-<size>. The "
  "same command resumes.",
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Compile the step, print the FLOPs and memory it takes, and exit."
)
FROM_STEP = flags.DEFINE_integer(
  "from_step",
  None,
  "Go back to this checkpoint of the run, such as one from before it diverged; what came later is "
  "set aside in the workdir. Give this once: the same command would go back again.",
  lower_bound=1,
)
DISTRIBUTED = cli.distributed_flag()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  cli.end_when_asked()
  c = config.resolve(CONFIG.value)
  stores.check_address(WORKDIR.value or "")
  joining = membership(DISTRIBUTED.value, os.environ) if DISTRIBUTED.value else None
  # These import all of JAX, which --help and refusals do not need.
  from beyond_outliers import train
  from beyond_outliers.mesh import processes

  if joining is not None:
    processes.join(c.distributed, joining)
    cli.ask_all_when_asked()
  try:
    status = train.run(
      c, WORKDIR.value or default_workdir(c), dry_run=DRY_RUN.value, from_step=FROM_STEP.value
    )
  except BaseException as error:
    processes.leave(error)
  processes.end(EXIT_CODES[status])


def default_workdir(c: config.Config) -> str:
  """runs/<name of the config file>-<size>."""
  name, _ = os.path.splitext(os.path.basename(cli.config_path()))
  return os.path.join("runs", f"{name}-{c.size}")


if __name__ == "__main__":
  cli.take_huge_pages()
  cli.run_command(main)
