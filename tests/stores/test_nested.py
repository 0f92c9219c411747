"""Addresses of which one lies in the other, and their folders here, which do so, too."""

import re

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from obstore.store import MemoryStore
from run_folders import texts, write, write_checkpoint

from beyond_outliers import stores
from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores.copies import Copy
from beyond_outliers.stores.store import DeniedError, Store

NAMES = ("exp", "exp/sweep/lr3")


@pytest.fixture
def stores_by_name():
  backend = MemoryStore()
  return {
    name: Store(f"s3://bucket/{name}", backend, name) for name in (*NAMES, "exp/sweep", "expand")
  }


def train(store, folder, said):
  """Of a run that leaves a file and a checkpoint."""
  folder.mkdir(parents=True, exist_ok=True)
  options = {"sealed": True, "say": said.append, "store": store}
  with stores.mirrored(store.address, folder, **options):
    write(folder, "config.json", store.address)
    write_checkpoint(folder, 2)


@pytest.mark.parametrize("first, second", [NAMES, NAMES[::-1]], ids=["below", "above"])
def test_a_run_in_anothers_address_is_refused(stores_by_name, tmp_path, said, first, second):
  train(stores_by_name[first], tmp_path / first, said)
  left = stores_by_name["exp"].sizes()
  for _ in range(2):
    addresses = [re.escape(stores_by_name[name].address) for name in (second, first)]
    with pytest.raises(WorkdirError, match=": ".join(addresses) + " holds a run") as refused:
      train(stores_by_name[second], tmp_path / second, said)
    assert "\n" not in str(refused.value)
  assert stores_by_name["exp"].sizes() == left
  train(stores_by_name["expand"], tmp_path / "expand", said)
  train(stores_by_name[first], tmp_path / first, said)


def test_a_start_that_failed_is_in_no_runs_way(stores_by_name, tmp_path, said):
  outer, inner = (stores_by_name[name] for name in NAMES)
  (tmp_path / "exp").mkdir()
  options = {"sealed": True, "say": said.append, "store": outer}
  for _ in range(2):
    with (
      pytest.raises(ZeroDivisionError),
      stores.mirrored(outer.address, tmp_path / "exp", **options),
    ):
      raise ZeroDivisionError
  assert not outer.sizes() and not said
  train(inner, tmp_path / "run", said)


def test_an_account_that_sees_only_its_own_folder_is_not_refused(
  stores_by_name, tmp_path, said, monkeypatch
):
  inner, real = stores_by_name[NAMES[1]], Store.read

  def read(self, name):
    if self.address != inner.address:
      raise DeniedError(f"{self.address}: access is denied to this account")
    return real(self, name)

  monkeypatch.setattr(Store, "read", read)
  train(inner, tmp_path / "run", said)
  assert "config.json" in inner.sizes()


def test_what_lies_here_of_another_run_stays_its_own(stores_by_name, tmp_path, said):
  """As of one whose store is gone, or of a time when both were allowed."""
  outer, inner = (stores_by_name[name] for name in NAMES)
  folders = [tmp_path / name for name in NAMES]
  train(inner, folders[1], said)
  inner.delete(list(inner.sizes()))
  train(outer, folders[0], said)
  assert not inner.sizes() and "config.json" in outer.sizes()
  outer.delete(list(outer.sizes()))
  before = texts(folders[1])
  train(outer, folders[0], said)  # which sets aside what was there
  assert list(tmp_path.glob("exp.aside-*")) and texts(folders[1]) == before


def test_a_copy_leaves_a_copy_in_its_folder_alone(stores_by_name, tmp_path, said):
  outer, inner = (stores_by_name[name] for name in NAMES)
  train(inner, tmp_path / "run", said)
  copy = Copy(inner.address, inner, tmp_path / "copies" / NAMES[1])
  copy.fetch_checkpoint(None)
  before = texts(copy.folder)
  assert before
  Copy(outer.address, outer, tmp_path / "copies" / NAMES[0])
  assert texts(copy.folder) == before
