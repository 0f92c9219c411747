"""The notebooks: as committed, and run from top to bottom on small runs of their own."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[test]'")

in_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# What belongs into a function of the package; a comprehension that names columns does not.
LOGIC = (
  ast.FunctionDef,
  ast.AsyncFunctionDef,
  ast.ClassDef,
  ast.Lambda,
  ast.For,
  ast.While,
  ast.If,
)
MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|mnt)\b|[A-Z]:\\\\")


def code_of(cell):
  """A cell's Python, without the lines for the shell."""
  lines = cell.source.splitlines()
  return "\n".join(re.sub(r"^( *)[!%].*", r"\1pass", line) for line in lines)


def test_there_are_notebooks():
  assert {path.stem for path in NOTEBOOKS} == {
    "ptq_and_error_propagation",
    "qat_across_optimizers",
    "run_and_checkpoints",
    "scaling_laws",
  }


@in_each
def test_a_notebook_is_text_that_opens_anywhere(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec.name == "python3"
  title, *_ = notebook.cells
  assert title.source.startswith("# ")
  assert "](https://colab.research.google.com/github/" in title.source
  assert not MACHINE.search(path.read_text())
  assert path.read_text() == nbformat.writes(notebook) + "\n", "as Jupyter saves it, indent 1"


@in_each
def test_a_notebook_holds_no_output_and_no_logic(path):
  cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
  assert len(cells) <= 12
  for cell in cells:
    assert not cell.outputs and cell.execution_count is None and not cell.metadata
  install, settings, *others = cells
  assert 'find_spec("beyond_outliers") is None' in install.source and "[report]" in install.source
  assigned = [node for node in ast.parse(code_of(settings)).body if isinstance(node, ast.Assign)]
  assert [ast.unparse(node.targets[0]) for node in assigned] == ["RUNS"]
  for cell in others:
    found = [node for node in ast.walk(ast.parse(code_of(cell))) if isinstance(node, LOGIC)]
    assert not found, f"{path.name}: a function of analysis, not {ast.unparse(found[0])}"
  assert others[-1].source.startswith("plots.plot_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where all notebooks run, so that they share their runs."""
  return tmp_path_factory.mktemp("notebooks")


def execute(path, folder, runs, monkeypatch):
  """A notebook on these runs, from top to bottom; the last cell draws."""
  nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
  pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")
  monkeypatch.setenv("BEYOND_OUTLIERS_RUNS", runs)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(path, as_version=4)
  where = {"metadata": {"path": str(folder)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
  *_, figure = notebook.cells
  assert any("image/png" in output.get("data", {}) for output in figure.outputs)


@pytest.mark.slow
@in_each
def test_a_notebook_runs_from_top_to_bottom(path, folder, monkeypatch):
  execute(path, folder, "tiny", monkeypatch)


@pytest.mark.slow
@in_each
def test_a_notebook_runs_on_the_results_of_a_clone_that_it_names(path, folder, monkeypatch):
  settings = nbformat.read(path, as_version=4).cells[2].source
  named = re.findall(r"[\",](colabs/results/[^\",]+)", settings)
  if not named:
    assert path.stem == "run_and_checkpoints", "which opens a checkpoint"
    return
  execute(path, folder, ",".join(str(ROOT / name) for name in named), monkeypatch)
