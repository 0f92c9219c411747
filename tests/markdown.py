"""Markdown as the tests of the documentation read it: sections, tables, code and links."""

import itertools
import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Table(NamedTuple):
  section: str  # the text between two headings that contains it
  header: list[str]
  rows: list[list[str]]


def guides() -> list[pathlib.Path]:
  """The project's Markdown files, from the root down; not those of hidden tools and test data."""
  hidden = (".venv", ".pytest_cache", ".guard", "golden")
  return sorted(
    path for path in ROOT.rglob("*.md") if not any(part in hidden for part in path.parts)
  )


def read(guide: str) -> str:
  """Fails with the guide's name where it is missing."""
  path = ROOT / guide
  assert path.exists(), f"{guide} is missing: the folder's guide, beside its code"
  return path.read_text()


def sections(text: str) -> list[str]:
  """The parts that headings of any level begin; what looks like a heading in code is none."""
  bare = FENCE.sub(lambda fence: re.sub("^#", " ", fence[0], flags=re.MULTILINE), text)
  starts = [
    0,
    *(heading.start() for heading in re.finditer(r"^#+ ", bare, re.MULTILINE)),
    len(text),
  ]
  return [text[start:end] for start, end in itertools.pairwise(starts)]


def tables(text: str) -> list[Table]:
  found = []
  for section in sections(text):
    for block in re.findall(r"(?:^\|.*\n?)+", section, re.MULTILINE):
      header, _, *rows = [_cells(line) for line in block.splitlines()]
      found.append(Table(section, header, rows))
  return found


def table_of(guide: str, *columns: str) -> list[list[str]]:
  """Rows of the one table of a guide whose header has these columns, cut down to them."""
  found = [table for table in tables(read(guide)) if set(columns) <= set(table.header)]
  assert len(found) == 1, f"{guide}: {len(found)} tables have the columns {columns}"
  places = [found[0].header.index(column) for column in columns]
  return [[row[place] for place in places] for row in found[0].rows]


def code(text: str) -> list[str]:
  """All code, a block or a span each."""
  rest = FENCE.sub("", text)
  indented = [line[4:] for line in re.findall(r"^ {4}.*$", rest, re.MULTILINE)]
  spans = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", rest, flags=re.MULTILINE))
  return [fence[1] for fence in FENCE.findall(text)] + ["\n".join(indented)] + spans


def snippets(text: str, language: str = "python") -> list[str]:
  return [body for name, body in FENCE.findall(text) if name == language]


def commands(text: str) -> list[str]:
  """Lines `python -m ...` of all code, up to a # or two spaces."""
  joined = re.sub(r" *\\\n *", " ", "\n".join(code(text)))
  lines = re.findall(r"(?:^|\s)(python -m .*)$", joined, re.MULTILINE)
  return [re.split(r"\s+#|\s{2,}", line)[0].strip() for line in lines]


def links(text: str) -> list[tuple[str, str]]:
  """(target in the repository, the guide itself if empty; heading in it, or nothing)."""
  targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
  return [(*target.split("#"), "")[:2] for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
  """The headings' anchors on GitHub."""
  headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
  named = [re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings]
  return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in named}


def _cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.strip().strip("|").split("|")]
