"""Types that the check's parts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from beyond_outliers.types import Json

Found = Mapping[str, Json]  # figures by row
Rows = Iterator[tuple[str, Callable[[], Json]]]  # (name, function that measures it)
Cells = list[tuple[str, str, str]]  # lines of the table: (what, figure, aim)
