"""The report: one self-contained page of HTML, with its figures and tables also as files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from beyond_outliers import runs as runs_lib
from beyond_outliers.analysis.page.evidence import gather
from beyond_outliers.analysis.page.section import Drawing, Table
from beyond_outliers.analysis.page.sections import make_sections
from beyond_outliers.analysis.page.svg import inlined
from beyond_outliers.analysis.page.text import NOTHING
from beyond_outliers.analysis.page.training_sections import every_run
from beyond_outliers.analysis.plots.style import NO_XML
from beyond_outliers.types import PathLike

__all__ = ["PAGE", "write_page"]

PAGE = "report.html"
LONG = 32  # characters; a column with a longer text wraps
NUMBER = re.compile(r"[*]{0,2}[+-]?(\d|inf)")
LIST = re.compile(r"<!-- files: (.*) -->\s*\Z")  # the end of a page, which lists its files
OWN = re.compile(r"[^/]+\.(csv|svg)")
NO_NUMBERS = (NOTHING, "", "none", "not finite", "not run", "unknown", "edge of the grid")


def write_page(
  runs: Sequence[runs_lib.Run],
  out: PathLike,
  *,
  roots: Sequence[str] = (),
  settings: Mapping[str, str] | None = None,
  folders: Sequence[PathLike] = (),
) -> str:
  """Writes the report into a folder: PAGE, its figures as SVG and its tables as CSV; returns the
  page's path. The same runs give the same bytes. Files that an earlier page in the folder lists in
  its last line are removed, unless this page has replaced them.

  roots: where the runs were found, as the page is to name them. settings, folders: see
  `ptq_degradation.degradation_cells`."""
  evidence = gather(runs, roots, settings, folders)
  writer = _Writer(epath.Path(out))
  before = _listed(writer.folder / PAGE)
  page = _environment(writer).get_template("report.html.jinja")
  text = page.render(
    evidence=evidence, sections=make_sections(evidence), every_run=every_run(evidence)
  )
  (writer.folder / PAGE).write_text(printable(text))
  for name in before - writer.names:
    (writer.folder / name).unlink(missing_ok=True)
  return os.fspath(writer.folder / PAGE)


def _listed(page: epath.Path) -> set[str]:
  """The files that an earlier page lists as its own."""
  listed = LIST.search(page.read_bytes().decode(errors="replace")) if page.exists() else None
  return {name for name in listed[1].split() if OWN.fullmatch(name)} if listed else set()


class _Writer:
  """Writes the files next to the page. A name that recurs, as with groups of the same name, gets a
  number."""

  def __init__(self, folder: epath.Path):
    self.folder, self.names = folder, set()

  def figure(self, drawing: Drawing) -> dict[str, Any]:
    """Draws a figure's file; returns its name, and the SVG for the page."""
    name = self._file(drawing.name, "svg")
    drawing.draw(self.folder / name)
    text = (self.folder / name).read_text()
    return {"file": name, "svg": inlined(text, name.replace(".", "-"), drawing.caption)}

  def table(self, table: Table) -> str:
    """Writes a table's file; returns its name."""
    name = self._file(table.name, "csv")
    text = table.numbers.to_csv(index=False, lineterminator="\n")
    (self.folder / name).write_text(printable(text))
    return name

  def _file(self, name: str, suffix: str) -> str:
    chosen, number = f"{name}.{suffix}", 2
    while chosen in self.names:
      chosen, number = f"{name}-{number}.{suffix}", number + 1
    self.names.add(chosen)
    return chosen


def printable(value: Any) -> Any:
  """Text without characters that HTML or UTF-8 cannot hold, which names of folders may contain."""
  if isinstance(value, str) and not isinstance(value, Markup):
    return NO_XML.sub("\ufffd", value)
  return value


def _environment(writer: _Writer) -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=printable,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  functions: dict[str, Any] = {
    **{"column_kinds": _column_kinds, "figure": writer.figure, "table_file": writer.table},
    "files": lambda: sorted(writer.names),
  }
  environment.globals |= functions  # pyrefly: ignore[bad-assignment]  (its globals, as stubs have them)
  environment.filters["cell"] = _cell
  return environment


def _cell(text: str) -> str:
  """A cell's text; text between ** is bold."""
  if text.startswith("**") and text.endswith("**") and len(text) > 4:
    return Markup("<strong>{}</strong>").format(printable(text[2:-2]))
  return text


def _column_kinds(rows: Sequence[Sequence[str]], count: int) -> list[str]:
  """The CSS class of each column: "n" for numbers, right-aligned; "long" for text that wraps."""

  def kind(column: Sequence[str]) -> str:
    if any(len(text) > LONG for text in column):
      return "long"
    numbers = [bool(NUMBER.match(text)) for text in column if text not in NO_NUMBERS]
    return "n" if numbers and all(numbers) else ""

  return [kind([row[at] for row in rows]) for at in range(count)]
