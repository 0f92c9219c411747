"""Tables as plain text, for a terminal."""
from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """A line a row, in columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
