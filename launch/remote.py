"""Jobs on machines that have this clone only in the image that launch/Dockerfile builds."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

from absl import flags

from beyond_outliers.errors import ConfigError
from launch.jobs import Job

ROOT = pathlib.Path(__file__).parent.parent  # what the image is built from
# Folders of it that launch/Dockerfile copies; a config file must be in one of them.
COPIED = ("beyond_outliers", "configs")

flags.disclaim_key_flags()  # flags belong to the launcher that defines them


def define_image(required: bool) -> None:
  flags.DEFINE_string(
    "image", None if required else "", "Image that launch/Dockerfile made.", required=required
  )


def check_image(image: str) -> None:
  """Errors: ConfigError for what cannot be an image's name."""
  if not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]*", image, re.ASCII):
    raise ConfigError(f"--image={image}: expected REGISTRY/NAME:TAG, as docker push takes it")


def check_files(config: str, root: str, mounted: Sequence[str] = ()) -> None:
  """Errors: ConfigError if a machine would not find the config file, or if what a run writes would
  be lost with the machine: the root is neither in an object store nor in a `mounted` folder."""
  path = os.path.normpath(config.partition(":")[0])
  if os.path.isabs(path) or path.split(os.sep)[0] not in COPIED:
    raise ConfigError(
      f"--config={config}: the image has {', '.join(COPIED)} of the clone only; put the file into "
      "configs/ and give that path, from the clone's folder"
    )
  inside = any(
    os.path.commonpath([root, folder]) == folder for folder in mounted if root[:1] == "/"
  )
  if "://" not in root and not inside:
    raise ConfigError(
      f"--root={root}: would be lost with the machine that writes there; give one in a bucket "
      f"(gs://...){f', or below {mounted[0]}' if mounted else ''}"
    )


def across(job: Job, processes: int, slices: int = 1) -> Job:
  """The job with the arguments that each of several processes needs."""
  if processes == 1 or job.kind == "report":
    return job
  more = ["--distributed=auto"]
  if job.kind == "train" and slices > 1:
    more.append(f"--config.mesh.dcn_data={slices}")
  return dataclasses.replace(job, arguments=(*job.arguments, *more))


def command(job: Job) -> list[str]:
  """The job's command in the image."""
  return ["python", "-m", job.module, *job.arguments]
