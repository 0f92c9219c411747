"""Predictions on paper, from known figures at known peaks."""

import pytest

from beyond_outliers.bench import scaling
from beyond_outliers.bench.study_configs import study_config
from beyond_outliers.hardware import CHIPS, Chip
from beyond_outliers.model import transformer


def test_a_step_takes_what_its_parts_take():
  """On hosts of eight devices: along fsdp within a host; along data, or both, between hosts."""
  chip = Chip(flops=100.0, memory=1.0, memory_bandwidth=10.0, together=8, fast=4.0, slow=2.0)
  figures = {
    "flops/model": 300.0,
    "flops/update": 50.0,
    "flops/decompositions": 100 * scaling.DECOMPOSITIONS,
    "state_bytes": 5.0,
    "sent_bytes": {"fsdp": 8.0, "data": 6.0, "data·fsdp": 2.0},
  }
  seconds = scaling.predicted_seconds(figures, chip, {"data": 8, "fsdp": 8, "model": 1})
  assert seconds == pytest.approx(
    {"model": 3, "update": 1.5 + 1, "sending": 2 + 3 + 1, "least": 6, "most": 11.5}
  )


def test_every_row_is_a_mesh_of_its_devices():
  assert all(
    data * fsdp * model == devices for devices, (data, fsdp, model) in scaling.DEVICE_MESHES.items()
  )
  assert len(scaling.ROWS) == 4 * 2 * 3 and set(CHIPS) == {"v5e", "v5p", "H100"}


def test_the_table_has_a_line_a_row():
  row = {
    "size": "50m",
    "optimizer": "adamw",
    "recipe": "none",
    "mesh": (8, 8, 1),
    "sent_bytes": {"fsdp": 3 * 2**20, "data": 2**20},
    "state_bytes": 5 * 2**20,
    "temporary_bytes": 7 * 2**20,
    "seconds": {
      chip: {"model": 0.003, "update": 0.001, "sending": 0.002, "least": 0.004, "most": 0.006}
      for chip in CHIPS
    },
  }
  refused = scaling.scaling_table([{**row, "does_not_fit": "no room"}]).splitlines()[1]
  assert refused.split()[3:] == ["8·8·1", "no", "room"]
  line = scaling.scaling_table([row]).splitlines()[1]
  assert "8·8·1" in line and "data 1, fsdp 3" in line and line.count("4.0–6.0, 25%") == 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["none", "quest_w4a4"])
def test_along_fsdp_parameters_are_sent_and_no_activations(recipe):
  """Once forward, once backward, and their gradient as an all-reduce, per part of the batch."""
  (row,) = scaling.measure_scaling([f"adamw/{recipe}/8"], "50m", "cpu")
  c = study_config("adamw", "50m")
  model = transformer.Transformer(c.model)
  size = 4 * transformer.count(transformer.shapes(model))["total"]
  parts = c.batch_size // (8 * scaling.WINDOWS)
  assert set(row["sent_bytes"]) == {"fsdp"}
  assert size < row["sent_bytes"]["fsdp"] < 4 * size * parts
