"""TPU slices: their names in Google Cloud, their number of hosts, and their topology.

From the Cloud TPU documentation of each version, and "Plan TPUs in GKE".
"""

from __future__ import annotations

import dataclasses
import math

from beyond_outliers.errors import ConfigError

GROUP = 4  # chips per host, in slices of several hosts


@dataclasses.dataclass(frozen=True)
class Kind:
  """A version of TPUs."""

  device: str  # JAX's name of a chip; its peak is in beyond_outliers/hardware.py
  memory: int  # GB per chip
  counted: int  # per chip in accelerators' names: a v5p-128 has 64 chips, of two cores each
  alone: int  # chips of the largest slice on one host
  label: str  # of GKE's nodes
  runtime: str  # image of Cloud TPU's machines
  topologies: tuple[str, ...]  # one for each number of chips


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
  "2x2x1",
  "2x2x2",
  "2x2x4",
  "2x4x4",
  "4x4x4",
  "4x4x8",
  "4x8x8",
  "8x8x8",
  "8x8x16",
  "8x16x16",
)

KINDS = {
  "v4": Kind("TPU v4", 32, 2, 4, "tpu-v4-podslice", "tpu-ubuntu2204-base", CUBES),
  "v5litepod": Kind("TPU v5e", 16, 1, 8, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", FLAT),
  "v5p": Kind("TPU v5p", 95, 2, 4, "tpu-v5p-slice", "v2-alpha-tpuv5", (*CUBES, "16x16x16")),
  "v6e": Kind("TPU v6e", 32, 1, 8, "tpu-v6e-slice", "v2-alpha-tpuv6e", FLAT),
}
OTHER_NAMES = {"v5e": "v5litepod"}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of TPUs: one JAX process per host, one device per chip."""

  accelerator: str  # type of accelerator, as gcloud names it
  kind: Kind
  topology: str
  hosts: int
  chips: int  # per host


def parse(accelerator: str, flag: str = "--accelerator") -> Slice:
  """The slice of a type such as v5litepod-256 (also v5e-256), or v5p-128.

  Errors: ConfigError if there is no such type."""
  version, _, count = accelerator.partition("-")
  version = OTHER_NAMES.get(version, version)
  if version not in KINDS:
    raise ConfigError(
      f"{flag}={accelerator}: expected a slice of TPUs, {', '.join(KINDS)} with a number after a "
      "hyphen: v5litepod-256, v5p-128"
    )
  kind = KINDS[version]
  by_count = {str(kind.counted * chips_of(topology)): topology for topology in kind.topologies}
  if count not in by_count:
    raise ConfigError(
      f"{flag}={accelerator}: slices of {version} have {', '.join(by_count)} "
      f"{'chips' if kind.counted == 1 else 'cores, two a chip'}"
    )
  topology = by_count[count]
  chips = chips_of(topology)
  each = chips if chips <= kind.alone else GROUP
  return Slice(f"{version}-{count}", kind, topology, chips // each, each)


def chips_of(topology: str) -> int:
  return math.prod(map(int, topology.split("x")))
