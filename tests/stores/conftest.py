"""A store in memory that knows conditions as S3 and GCS do, and mirrors of it that wait for
nothing."""

import pytest
from run_folders import ADDRESS, Failing, mirror_of, write, write_checkpoint

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
def stopped(monkeypatch):
  """Signals that a mirror sends to its process, which does not get them."""
  signals = []
  monkeypatch.setattr(mirror_lib.os, "kill", lambda pid, number: signals.append(number))
  return signals


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


@pytest.fixture
def run(store, tmp_path, said):
  """(mirror, folder) of a run with the checkpoints 2 and 4, all uploaded."""
  mirror, folder = mirror_of(store, tmp_path / "run", said), tmp_path / "run"
  for name in ("config.json", "manifest.json", "metrics.jsonl", "status.json"):
    write(folder, name)
  for step in (2, 4):
    write_checkpoint(folder, step, str(step))
  mirror.push()
  return mirror, folder
