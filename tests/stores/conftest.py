"""A store in memory that knows conditions as S3 and GCS do, and mirrors of it that wait for
nothing."""

import pytest
from run_folders import ADDRESS, Failing

from beyond_outliers import stores
from beyond_outliers.stores import lease as lease_lib
from beyond_outliers.stores import mirror as mirror_lib


@pytest.fixture
def store():
  from obstore.store import MemoryStore

  return Failing(ADDRESS, MemoryStore(), "run")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
  """No waiting: what a thread does every few seconds the tests do themselves."""
  monkeypatch.setattr(mirror_lib, "WAIT_SECONDS", 0.0)
  monkeypatch.setattr(mirror_lib, "PUSH_SECONDS", 3600.0)
  monkeypatch.setattr(lease_lib, "STALE_SECONDS", 0.05)
  monkeypatch.setattr("beyond_outliers.stores.copies.REFRESH_SECONDS", -1.0)


@pytest.fixture
def said():
  return []


@pytest.fixture
def mirrored(store, said):
  def begin(folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    options = {"sealed": True, "say": said.append, "store": store, **options}
    return stores.mirrored(ADDRESS, folder, **options)

  return begin
