"""Start-up: a command imports no library that the work at hand does not use."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "pandas", "scipy"}

# Runs code, and then says which of the heavy libraries it has loaded.
SCRIPT = """
import json, os, runpy, sys

def run(command, *arguments):
  sys.argv = [command, *arguments]
  with open(os.devnull, "w") as nowhere:
    sys.stdout = sys.stderr = nowhere
    try:
      runpy.run_module("beyond_outliers." + command, run_name="__main__")
    except SystemExit as error:
      return error.code
    finally:
      sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

expression, *heavy = sys.argv[1:]
value = eval(expression)
print(json.dumps([value, sorted({name.partition(".")[0] for name in sys.modules} & set(heavy))]))
"""


def loaded_by(expression):
  """(its value, the heavy libraries that evaluating it loaded), in a process of its own."""
  process = subprocess.run(
    [sys.executable, "-c", SCRIPT, expression, *HEAVY],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert process.returncode == 0, process.stderr
  value, loaded = json.loads(process.stdout)
  return value, set(loaded)


@pytest.mark.parametrize(
  "command, arguments, code",
  [
    ("main", ["--help"], 1),
    ("main", ["--config=configs/adamw.py:nano,optimizer.b1=2"], 2),
    ("main", ["--config=configs/adamw.py:nano", "--distributed=here"], 2),
    ("prepare", ["--help"], 1),
    ("prepare", ["--config=configs/adamw.py:nano,data.seed=-1"], 2),
    ("evaluate", ["--help"], 1),
    ("evaluate", ["--workdir=runs/one", "--hf=another"], 2),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_help_and_a_refusal_load_nothing_heavy(command, arguments, code):
  call = f"run({command!r}, *{arguments!r})"
  assert loaded_by(call) == (code, set())


def test_a_dry_run_needs_neither_checkpoints_nor_data():
  arguments = "--config=configs/adamw.py:nano,model.blocks=1,model.d_head=4,context=16", "--dry_run"
  code, loaded = loaded_by(f"run('main', *{arguments!r})")
  assert code == 0
  assert not loaded & {"orbax", "grain", "tensorflow_datasets", "pandas", "scipy"}


@pytest.mark.parametrize(
  "module, needs",
  [
    ("cli", set()),
    ("config", set()),
    ("types", set()),
    ("data", set()),
    ("prepare", set()),
    ("runs", {"jax", "flax"}),
    ("train", {"jax", "flax", "optax"}),
  ],
)
def test_a_module_loads_what_it_needs(module, needs):
  _, loaded = loaded_by(f"__import__('beyond_outliers.{module}') and None")
  assert loaded <= needs
