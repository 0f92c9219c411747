"""The README of data/ names every module, and the rows of its smaller tables."""

import pathlib

import pytest

from beyond_outliers import data
from beyond_outliers.data import pipeline, splits

README = (pathlib.Path(data.__file__).parent / "README.md").read_text()
MODULES = {path.stem for path in pathlib.Path(data.__file__).parent.glob("[a-z]*.py")}


@pytest.mark.parametrize(
  "written",
  [f"`{name}`" for name in sorted(MODULES)]
  + [f"| `{rule}:" for rule in splits.SPLITS]
  + [f"data.reader={name}`" for name in pipeline.READERS],
)
def test_every_row_is_named(written):
  assert written in README
