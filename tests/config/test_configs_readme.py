"""The README of configs/: its sizes, and the fields of its open points, are the configuration's."""

import pathlib
import re

import pytest

from beyond_outliers import config
from beyond_outliers.model import transformer
from configs import adamw

README = (pathlib.Path(__file__).parents[2] / "configs" / "README.md").read_text()


def rows(title):
  """Cells of the body of a section's table."""
  section = README.split(f"## {title}\n")[1].split("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("|")][2:]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_fields_of_the_open_points_exist():
  known = config.flatten(config.to_dict(config.resolve(adamw.get_config())))
  table = rows("Where the paper is silent")
  assert len(table) >= 10
  for point, _, fields, _ in table:
    named = re.findall(r"`([^`]+)`", fields)
    assert named, point
    assert not [field for field in named if field not in known], point


@pytest.mark.parametrize("row", rows("Sizes"), ids=lambda row: row[0])
def test_sizes(row):
  c = config.resolve(adamw.get_config(row[0].strip("`"))).model
  counts = transformer.count(transformer.shapes(transformer.Transformer(c)))
  assert row[1] == f"{c.blocks} × {c.heads} × {c.d_head}"
  assert row[2:4] == [f"{counts['total']:,}", f"{counts['embedding']:,}"]


def test_every_size_is_listed():
  assert [row[0].strip("`") for row in rows("Sizes")] == list(config.SIZES)


def test_every_section_is_listed():
  named = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows("Sections")))
  plain = re.findall(r"`(\w+)`", rows("Sections")[0][1])
  assert sorted(named + plain) == sorted(config.to_dict(config.resolve(adamw.get_config())))
