"""Packaging: an installation holds every module, the configs that benches import, and what is
no code but read by it."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_every_module_is_packaged(monkeypatch):
  pytest.importorskip("setuptools")
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
