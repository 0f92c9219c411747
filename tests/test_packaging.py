"""Packaging: an installation holds every module, the configs that benches import, and what is
no code but read by it."""

import pathlib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent


def test_every_module_is_packaged(monkeypatch):
  pytest.importorskip("setuptools", reason="builds the package")
  from distutils.core import run_setup

  monkeypatch.chdir(ROOT)
  distribution = run_setup("setup.py", stop_after="init")
  folders = {
    path.parent.relative_to(ROOT)
    for package in ("beyond_outliers", "configs")
    for path in (ROOT / package).rglob("*.py")
  }
  assert set(distribution.packages) == {".".join(folder.parts) for folder in folders}
  package = ROOT / "beyond_outliers"
  data = distribution.package_data["beyond_outliers"]
  packaged = {path for pattern in data for path in package.glob(pattern)}
  sources = {path for path in package.rglob("*.*") if path.suffix not in (".py", ".md", ".pyc")}
  assert packaged == {package / "py.typed", *sources}


def test_the_versions_that_were_tested_are_within_the_bounds(monkeypatch):
  pytest.importorskip("setuptools", reason="builds the package")
  from distutils.core import run_setup

  monkeypatch.chdir(ROOT)
  distribution = run_setup("setup.py", stop_after="init")
  lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
  exact = {
    canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
  }
  extras = distribution.extras_require.values()
  required = [*distribution.install_requires, *(one for extra in extras for one in extra)]
  for requirement in map(Requirement, required):
    name = canonicalize_name(requirement.name)
    if name in exact:
      assert requirement.specifier.contains(exact[name]), f"{requirement}: {exact[name]}"
