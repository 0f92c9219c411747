"""Completeness of the guides: rows of tables have their line, results their command, links their
file; and the README is short."""

import re

import markdown
import pytest

from beyond_outliers import optim, quant
from beyond_outliers.data import documents, tokenizers

ROOT = markdown.ROOT
PACKAGE = ROOT / "beyond_outliers"
BENCH = PACKAGE / "bench" / "__main__.py"

# Where every row of a table is named; of BENCHES the flags, since importing a command defines them.
ROWS = {
  "OPTIMIZERS": ("beyond_outliers/optim/README.md", optim.OPTIMIZERS),
  "SCHEDULES": ("beyond_outliers/optim/README.md", optim.SCHEDULES),
  "RECIPES": ("beyond_outliers/quant/README.md", quant.RECIPES),
  "METHODS": ("beyond_outliers/quant/ptq/README.md", quant.METHODS),
  "SOURCES": ("beyond_outliers/data/README.md", documents.SOURCES),
  "TOKENIZERS": ("beyond_outliers/data/README.md", tokenizers.TOKENIZERS),
  "BENCHES": (
    "beyond_outliers/bench/README.md",
    re.findall(r'^  "(\w+)": Bench\(', BENCH.read_text(), re.MULTILINE),
  ),
}
# Whose tables are results.
RESULTS = ("colabs/README.md", "beyond_outliers/bench/README.md")
# Words of a path that stand for others, and folders that runs make.
PLACEHOLDER = re.compile(r"[<>{}*$()]|(^|[/_.=])(?!README|CHANGELOG|CONTRIBUTING|LICENSE)[A-Z]{2,}")
MADE = ("runs/", "datasets/", "eval/", "tasks/", "checkpoints/", "/")
FILE = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*\.(?:py|md|sh|png|toml|yaml|npz)(?!\w)")
# Files that text speaks of, and that no clone holds.
OTHERS = {"curves.png", "gap.png"}

GUIDES = [path.relative_to(ROOT).as_posix() for path in markdown.guides()]


@pytest.mark.parametrize("table", ROWS)
def test_every_row_of_a_table_is_named_in_its_guide(table):
  guide, rows = ROWS[table]
  assert rows, f"{table} was not found"
  words = {
    word.removesuffix(".py").removeprefix("--").split("=")[0].split(":")[0]
    for code in markdown.code(markdown.read(guide))
    for word in re.findall(r"[\w.+:=-]+", code)
  }
  missing = [name for name in rows if name not in words]
  assert not missing, f"{guide} does not name these rows of {table} as `code`: {missing}"


@pytest.mark.parametrize("guide", RESULTS)
def test_results_stand_beside_the_command_that_prints_them(guide):
  found = markdown.tables(markdown.read(guide))
  assert found, f"{guide} has no table"
  for table in found:
    assert markdown.commands(table.section), (
      f"{guide}: no `python -m ...` in the section of the table | {' | '.join(table.header)} |"
    )


def test_the_readme_is_one_screen():
  lines = markdown.read("README.md").count("\n")
  assert lines <= 150, f"README.md has {lines} lines; what is of one folder goes into its README"


def test_every_folder_of_code_that_people_change_has_a_guide():
  parts = ("analysis", "bench", "data", "evaluate", "model", "optim", "quant", "quant/ptq", "train")
  folders = [f"beyond_outliers/{part}" for part in parts]
  folders += ["configs", "launch", "colabs", "findings"]
  missing = [folder for folder in folders if not (ROOT / folder / "README.md").exists()]
  assert not missing, f"no README.md in {missing}"


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
  here, broken = ROOT / guide, []
  for target, heading in markdown.links(markdown.read(guide)):
    there = here.parent / target if target else here
    if not there.exists() or (heading and heading not in markdown.anchors(there.read_text())):
      broken.append(f"{target}#{heading}")
  assert not broken, f"{guide} links to what is not there: {broken}"


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if guide != "CHANGELOG.md"])
def test_files_that_are_named_exist(guide):
  """From the guide's folder, the package, the root or configs/; the changelog speaks of the
  past."""
  here = (ROOT / guide).parent
  missing = []
  for code in markdown.code(markdown.read(guide)):
    for name in FILE.findall(code) if "\n" not in code else ():
      looked_at = not (PLACEHOLDER.search(code) or code.startswith(MADE) or name in OTHERS)
      places = (here, PACKAGE, ROOT, ROOT / "configs")
      if looked_at and not any((place / name).exists() for place in places):
        missing.append(name)
  assert not missing, f"{guide} names files that are not there: {missing}"


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if guide != "CHANGELOG.md"])
def test_names_of_modules_beside_a_guide_exist(guide):
  """`hooks.Save`, where hooks.py lies in the guide's folder: classes and private names, which look
  like no key of the configuration and no file."""
  missing = []
  for code in markdown.code(markdown.read(guide)):
    for name, member in re.findall(r"(?<![\w./])(\w+)\.(_\w+|[A-Z]\w+)", code):
      module = (ROOT / guide).parent / f"{name}.py"
      if module.exists() and not re.search(rf"\b{member}\b", module.read_text()):
        missing.append(f"{name}.{member}")
  assert not missing, f"{guide} names what its modules have not: {missing}"


def test_the_tree_of_the_readme_has_every_part():
  (tree,) = [
    text for text in markdown.snippets(markdown.read("README.md"), "") if "main.py" in text
  ]
  parts = {path.name for path in PACKAGE.iterdir() if not path.name.startswith(("_", "."))}
  parts = {
    name for name in parts if name.endswith(".py") or (PACKAGE / name / "__init__.py").exists()
  }
  named = {name.rstrip("/") for name in re.findall(r"(?:^|\s)([\w.]+/|\w+\.py)(?=\s)", tree)}
  assert not parts - named, f"README.md's tree lacks {sorted(parts - named)}"
  folders = {"beyond_outliers", "configs", "launch", "findings", "colabs", "tests"}
  assert folders <= named
  for name in named - folders:
    assert (PACKAGE / name).exists(), f"README.md's tree names {name}, which is not there"


@pytest.mark.parametrize(
  "script", sorted((ROOT / "findings").glob("*.sh")), ids=lambda path: path.stem
)
def test_a_finding_is_listed_pinned_and_alone(script):
  """It is not run here, since it installs what it is about."""
  text = script.read_text()
  assert f"({script.name})" in markdown.read("findings/README.md"), "findings/README.md lists it"
  assert script.stat().st_mode & 0o111, f"chmod +x {script.name}"
  assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
  assert "mktemp -d" in text and "beyond_outliers" not in text
  assert '"changed: ' in text, "it says so and fails where the library does otherwise"
  for line in text.splitlines():
    if 'pip" install' in line:
      requirements = [word for word in line.split("install ")[1].split() if word[0] != "-"]
      assert all("==" in word for word in requirements), f"pin all of {requirements}"


def test_findings_that_are_listed_exist():
  listed = re.findall(r"\(([\w.]+\.sh)\)", markdown.read("findings/README.md"))
  assert listed and all((ROOT / "findings" / name).exists() for name in listed)
