"""Truth of the guides: commands and settings exist, snippets run or at least name what is there,
sizes and fields are the configuration's."""

import ast
import importlib
import os
import re
import runpy
import shlex
import shutil

import commands
import markdown
import pytest

from beyond_outliers import config, quant
from beyond_outliers.evaluate import offline_tasks
from beyond_outliers.model import transformer
from configs import adamw

ROOT = markdown.ROOT
GOLDEN = ROOT / "tests" / "golden" / "workdir_0_1"
OURS = ("beyond_outliers", "launch")


def sources():
  """(where, text) of all that shows commands: guides, and docstrings of modules and configs."""
  for path in markdown.guides():
    if path.name != "CHANGELOG.md":
      yield path.relative_to(ROOT).as_posix(), path.read_text()
  for folder in (*OURS, "configs"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
      # Lines that begin in the first column are prose: code is indented.
      lines = [line for line in docstring.splitlines() if line.startswith("  ")]
      yield path.relative_to(ROOT).as_posix(), "\n".join(f"    {line.strip()}" for line in lines)


def shown():
  """(where, module, arguments) of every command of ours."""
  for where, text in sources():
    for command in markdown.commands(text):
      module, *arguments = shlex.split(command.removeprefix("python -m "))
      if module.split(".")[0] in OURS:
        yield where, module, arguments


SHOWN = {}
for _where, _module, _arguments in shown():
  SHOWN.setdefault(_where, []).append((_module, _arguments))
in_each = pytest.mark.parametrize("where", SHOWN)


def runnable(module):
  """The module that `python -m` runs, which is a package's __main__; None where there is none."""
  path = ROOT / module.replace(".", "/")
  if (path / "__main__.py").exists():
    return f"{module}.__main__"
  return module if path.with_suffix(".py").exists() else None


def flags_in(arguments):
  """{flag: its value as text} of a command."""
  return dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))


@pytest.fixture(scope="module")
def known_flags():
  modules = {runnable(module) for commands_in in SHOWN.values() for module, _ in commands_in}
  return commands.flags_of(sorted(filter(None, modules)))


def test_the_readme_shows_every_command():
  assert {module for module, _ in SHOWN["README.md"]} == {
    "beyond_outliers.main",
    "beyond_outliers.prepare",
    "beyond_outliers.evaluate",
    "beyond_outliers.analysis",
    "beyond_outliers.bench",
    "launch.local",
  }


@in_each
def test_commands_and_their_flags_exist(where, known_flags):
  for module, arguments in SHOWN[where]:
    assert runnable(module), f"{where}: python -m {module}: no such module"
    for flag in flags_in(arguments):
      known = flag in known_flags[runnable(module)] or flag.startswith("config.")
      assert known, f"{where}: {module} has no flag --{flag}"


@in_each
def test_configurations_resolve(where):
  """Values that stand for others (FILES, DIR) are any text to a configuration."""
  for _, arguments in SHOWN[where]:
    given = flags_in(arguments)
    if "config" in given:
      path, _, argument = given["config"].replace("OPTIMIZER", "adamw").partition(":")
      assert (ROOT / path).exists(), f"{where}: no {path}"
      changes = [f"{key[7:]}={value}" for key, value in given.items() if key.startswith("config.")]
      c = runpy.run_path(str(ROOT / path))["get_config"](argument)
      config.resolve(config.override(c, config.parse_argument(",".join(["nano", *changes]))[1]))


@in_each
def test_names_in_flags_are_rows(where):
  hub = {"piqa", "hellaswag", "arc_easy"}  # tasks that are not on this machine
  for module, arguments in SHOWN[where]:
    given = {name: value for name, value in flags_in(arguments).items() if value != "..."}
    values = {name: list(filter(None, value.split(","))) for name, value in given.items()}
    if module == "beyond_outliers.evaluate":
      for recipe in values.get("recipes", ()):
        assert recipe in quant.RECIPES, f"{where}: no recipe {recipe}"
      for method in values.get("methods", ()):
        row = re.sub(r"\(.*?\)", "", method)  # gptq(damping=0.1)
        assert row in quant.METHODS, f"{where}: no method {method}"
      if "task_folders" not in given:
        assert {*values.get("tasks", ())} <= {*offline_tasks.HELD_OUT, *hub}, where
    if module == "beyond_outliers.bench":
      for flag in ("on_paper", "collectives", "ptq", "scoring"):
        assert given.get(flag, "nano") in config.SIZES, f"{where}: --{flag}={given[flag]}"
    if module.startswith("launch."):
      path = given["config"].replace("OPTIMIZER", "adamw").partition(":")[0]
      assert "get_hyper" in runpy.run_path(str(ROOT / path)), f"{where}: {path} has no sweep"


def selections():
  """(where, path, words) of every `python -m pytest PATH -k "..."`."""
  for where, text in sources():
    for command in markdown.commands(text):
      words = shlex.split(command.removeprefix("python -m "))
      if words[0] == "pytest":
        paths = [word for word in words[1:] if word.startswith("tests")] or ["tests"]
        chosen = words[words.index("-k") + 1] if "-k" in words else ""
        yield where, paths[0], tuple(w for w in chosen.split() if w not in ("or", "and", "not"))


@pytest.mark.parametrize(("where", "path", "words"), list(selections()))
def test_tests_that_are_named_exist(where, path, words):
  assert (ROOT / path).exists(), f"{where}: no {path}"
  files = (ROOT / path).rglob("*.py") if (ROOT / path).is_dir() else [ROOT / path]
  names = " ".join(
    name
    for file in files
    for name in re.findall(r"def (test_\w+)|^\s*\"(\w+)\"", file.read_text())
    for name in name
  )
  for word in words:
    assert word in names, f"{where}: no test of {path} has {word!r} in its name"


SNIPPETS = [
  pytest.param(where, snippet, id=f"{where}-{number}")
  for where, text in sources()
  if where.endswith(".md")
  for number, snippet in enumerate(markdown.snippets(text))
]


@pytest.mark.parametrize(("where", "snippet"), SNIPPETS)
def test_snippets_name_what_is_there(where, snippet):
  """Parses; imports work; attributes of what was imported exist."""
  tree, imported = ast.parse(snippet), {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        try:
          thing = importlib.import_module(f"{node.module}.{alias.name}")
        except ImportError:
          thing = getattr(importlib.import_module(str(node.module)), alias.name)
        imported[alias.asname or alias.name] = thing
    elif isinstance(node, ast.Import):
      for alias in node.names:
        importlib.import_module(alias.name)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      first, *rest = ast.unparse(node).split(".")
      thing = imported.get(first)
      for name in rest if thing is not None and all(map(str.isidentifier, rest)) else ():
        assert hasattr(thing, name), f"{where}: {ast.unparse(node)}: no {name}"
        thing = getattr(thing, name)


@pytest.mark.slow
def test_the_readme_s_snippet_runs(tmp_path, monkeypatch, capsys):
  shutil.copytree(GOLDEN / "adamw", tmp_path / "runs" / "adamw-nano")
  shutil.copytree(GOLDEN / "prepared", tmp_path / "datasets")
  monkeypatch.chdir(tmp_path)
  (snippet,) = markdown.snippets(markdown.read("README.md"))
  exec(compile(snippet, "README.md", "exec"), {})
  said = capsys.readouterr().out
  assert "max_to_median" in said and re.search(
    r"[\d,]+ bytes, the same likeliest token at \d+%", said
  )


def test_the_test_command_is_what_ci_runs():
  """.ci/run installs and runs what the README says, line by line."""
  block = markdown.read("README.md").split("## Tests\n")[1].split("\n## ")[0]
  script = (ROOT / ".ci" / "run").read_text()
  lines = [line.strip() for line in block.splitlines() if line.startswith("    ")]
  assert lines[0].startswith("pip install -c constraints.txt")
  assert lines[-1] == "python -m pytest -n 2 --dist loadfile"
  for line in lines:
    assert line.removeprefix("pip install ") in script, f".ci/run lacks {line}"


def test_fields_of_the_open_points_exist():
  known = config.flatten(config.to_dict(config.resolve(adamw.get_config())))
  table = markdown.table_of("configs/README.md", "open point", "config field")
  assert len(table) >= 10
  for point, fields in table:
    named = re.findall(r"`([^`]+)`", fields)
    assert named, point
    assert not [field for field in named if field not in known], point


SIZE, SHAPE, COUNTS = "size", "blocks × heads × d_head", ("parameters", "of them embedding")


@pytest.mark.parametrize("size", config.SIZES)
def test_sizes(size):
  rows = {
    row[0].strip("`"): row[1:]
    for row in markdown.table_of("configs/README.md", SIZE, SHAPE, *COUNTS)
  }
  assert size in rows, f"configs/README.md has no row for {size}"
  c = config.resolve(adamw.get_config(size)).model
  counts = transformer.count(transformer.shapes(transformer.Transformer(c)))
  assert rows[size] == [
    f"{c.blocks} × {c.heads} × {c.d_head}",
    f"{counts['total']:,}",
    f"{counts['embedding']:,}",
  ]


def test_every_size_is_listed():
  rows = markdown.table_of("configs/README.md", SIZE)
  assert [row[0].strip("`") for row in rows] == list(config.SIZES)


def test_the_readme_s_numbers_are_the_lab_book_s():
  """Which are those of the packed runs (tests/colabs/test_results.py)."""
  assert os.path.exists(ROOT / "colabs" / "figures" / "ladder_predictors.png")
  ours, book = (
    [table for table in markdown.tables(markdown.read(guide)) if trained in table.header]
    for guide, trained in (
      ("README.md", "trained in four bits (QuEST W4A4)"),
      ("colabs/README.md", "trained under `quest_w4a4`"),
    )
  )
  of_optimizer = {row[0]: row for row in book[0].rows}
  assert len(ours[0].rows) == 6
  for row in ours[0].rows:  # full precision, QuEST, rtn, hadamard and its R_L centred, MMR
    assert row == [of_optimizer[row[0]][column] for column in (0, 1, 2, 3, 7, 9, 10)]
