"""Jobs on machines that have nothing of this clone but the image that launch/Dockerfile makes."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

from absl import flags

from beyond_outliers.errors import ConfigError
from launch.jobs import Job

ROOT = pathlib.Path(__file__).parent.parent  # what the image is made of
# Folders of it that launch/Dockerfile copies, and that a config file may lie in.
COPIED = ("beyond_outliers", "configs")

flags.disclaim_key_flags()  # they belong to the launcher that defines them


def define_image(required: bool) -> None:
  flags.DEFINE_string(
    "image", None if required else "", "Image that launch/Dockerfile made.", required=required
  )


def check_image(image: str) -> None:
  """Errors: ConfigError for what is no image's name."""
  if not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]*", image, re.ASCII):
    raise ConfigError(f"--image={image}: expected REGISTRY/NAME:TAG, as docker push takes it")


def check_files(config: str, root: str, mounted: Sequence[str] = ()) -> None:
  """Errors: ConfigError where a machine would not find the config file, or where what a run writes
  would end with the machine: in neither an object store nor one of the folders `mounted`."""
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
  """The job as one of several processes runs it."""
  if processes == 1 or job.kind == "report":
    return job
  more = ["--distributed=auto"]
  if job.kind == "train" and slices > 1:
    more.append(f"--config.mesh.dcn_data={slices}")
  return dataclasses.replace(job, arguments=(*job.arguments, *more))


def command(job: Job) -> list[str]:
  """In the image."""
  return ["python", "-m", job.module, *job.arguments]
