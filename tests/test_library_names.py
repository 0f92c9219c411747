"""Names of JAX and its libraries that the sources use: each is there, and is not on its way out.

Run in an environment of another version, this says in a second what that one has removed."""

import ast
import importlib
import pathlib
import warnings

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBRARIES = ("jax", "flax", "optax", "orbax", "ml_collections", "etils", "grain")
SOURCES = [
  path
  for folder in ("beyond_outliers", "configs", "launch", "tests")
  for path in sorted((ROOT / folder).rglob("*.py"))
]


def aliases(tree):
  """{name in a module: dotted name in a library}, of its imports."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        name = alias.name if alias.asname else alias.name.partition(".")[0]
        found[alias.asname or name] = name
    elif isinstance(node, ast.ImportFrom):
      found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
  return {name: of for name, of in found.items() if of.partition(".")[0] in LIBRARIES}


def names_in(tree):
  """Dotted names of libraries that a module uses, with what it imports."""
  known = aliases(tree)
  found = set(known.values())
  for node in ast.walk(tree):
    chain, below = [], node
    while isinstance(below, ast.Attribute):
      chain, below = [below.attr, *chain], below.value
    if chain and isinstance(below, ast.Name) and below.id in known:
      found.add(".".join([known[below.id], *chain]))
  return found


def problem_with(name):
  """What is wrong with a dotted name, if anything is: attributes of modules are looked up, those of
  what a module holds are not."""
  first, *rest = name.split(".")
  here, path = importlib.import_module(first), first
  for attribute in rest:
    if not hasattr(here, "__path__") and type(here).__name__ != "module":
      return ""
    path = f"{path}.{attribute}"
    with warnings.catch_warnings():
      warnings.simplefilter("error", DeprecationWarning)
      try:
        here = getattr(here, attribute)
      except DeprecationWarning as warning:
        return f"{path}: {warning}"
      except AttributeError:
        try:
          here = importlib.import_module(path)
        except ImportError:
          return f"{path} is not there"
  return ""


def test_every_name_is_there_and_none_is_deprecated():
  names = set().union(*(names_in(ast.parse(path.read_text())) for path in SOURCES))
  assert {"jax.numpy.float32", "optax.GradientTransformation"} <= names
  assert not [problem for name in sorted(names) if (problem := problem_with(name))]


@pytest.mark.parametrize("name", ["jax.numpy.no_such_name", "jax.no_such_module.x"])
def test_a_name_that_is_not_there_is_told(name):
  assert "is not there" in problem_with(name)


def test_only_one_module_takes_what_jax_does_not_publish():
  """`jax._src` moves without notice: whoever needs it says why, and tests it."""
  users = [
    path.relative_to(ROOT).as_posix()
    for path in SOURCES
    if path.is_relative_to(ROOT / "beyond_outliers")
    and any("._src" in name for name in names_in(ast.parse(path.read_text())))
  ]
  assert users == ["beyond_outliers/mesh/processes.py"]
