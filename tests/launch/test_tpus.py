"""Slices of TPUs: their hosts and topologies as Google's tables have them."""

import markdown
import pytest

from beyond_outliers import hardware
from beyond_outliers.errors import ConfigError
from launch import tpus

# accelerator type -> (topology, hosts, chips of a host), from "TPU configurations" of each version.
PUBLISHED = {
  "v4-8": ("2x2x1", 1, 4),
  "v4-32": ("2x2x4", 4, 4),
  "v4-4096": ("8x16x16", 512, 4),
  "v5litepod-1": ("1x1", 1, 1),
  "v5litepod-4": ("2x2", 1, 4),
  "v5litepod-8": ("2x4", 1, 8),
  "v5litepod-16": ("4x4", 4, 4),
  "v5litepod-256": ("16x16", 64, 4),
  "v5p-8": ("2x2x1", 1, 4),
  "v5p-128": ("4x4x4", 16, 4),
  "v5p-2048": ("8x8x16", 256, 4),
  "v6e-8": ("2x4", 1, 8),
  "v6e-256": ("16x16", 64, 4),
}


@pytest.mark.parametrize("accelerator", PUBLISHED)
def test_slices_are_those_of_google_s_tables(accelerator):
  part = tpus.parse(accelerator)
  assert (part.topology, part.hosts, part.chips) == PUBLISHED[accelerator]
  assert part.hosts * part.chips == tpus.chips_of(part.topology)


def test_v5e_is_what_gcloud_calls_v5litepod():
  assert tpus.parse("v5e-256") == tpus.parse("v5litepod-256")


@pytest.mark.parametrize("version", tpus.KINDS)
def test_each_kind_has_a_peak_and_one_topology_for_each_number_of_chips(version):
  kind = tpus.KINDS[version]
  assert kind.device in hardware.BFLOAT16_PEAKS
  counts = [tpus.chips_of(topology) for topology in kind.topologies]
  assert counts == sorted(set(counts))
  # A slice of several hosts is made of whole ones.
  assert all(count <= kind.alone or count % tpus.GROUP == 0 for count in counts)


@pytest.mark.parametrize(
  "accelerator", ["", "v5p", "v5p-", "v5p-100", "v5p-0128", "v5litepod--1", "h100", "v5p-١٢٨"]
)
def test_what_is_no_slice_is_refused_with_those_that_are(accelerator):
  with pytest.raises(ConfigError, match=f"--accelerator={accelerator}: .*(v5p|v5litepod|128)"):
    tpus.parse(accelerator)


def test_the_guide_s_table_is_this_one():
  columns = ("nodes of GKE", "memory a chip", "peak a chip, bfloat16")
  assert markdown.table_of("launch/README.md", *columns) == [
    [
      f"`{kind.label}`",
      f"{kind.memory} GB",
      f"{hardware.BFLOAT16_PEAKS[kind.device] / 1e12:.0f} TFLOP/s",
    ]
    for kind in tpus.KINDS.values()
  ]
