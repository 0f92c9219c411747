"""The README of data/ names every row of its tables."""

import pathlib

import pytest

from beyond_outliers import data
from beyond_outliers.data import documents, pipeline, splits, tokenizers

README = (pathlib.Path(data.__file__).parent / "README.md").read_text()
MODULES = {path.stem for path in pathlib.Path(data.__file__).parent.glob("[a-z]*.py")}


@pytest.mark.parametrize(
  "written",
  [f"`{name}`" for name in (*documents.SOURCES, *sorted(MODULES))]
  + [f"| `{name}" for name in tokenizers.TOKENIZERS]
  + [f"| `{rule}:" for rule in splits.SPLITS]
  + [f"data.reader={name}`" for name in pipeline.READERS],
)
def test_every_row_is_named(written):
  assert written in README
