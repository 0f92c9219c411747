"""A holder that was cut off: whatever it still does, the run that took over loses nothing."""

import json

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import ADDRESS, Failing, mirror_of, write, write_checkpoint

from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores import mirror as mirror_lib
from beyond_outliers.stores.store import StoreError

OTHER = json.dumps({"id": "other", "host": "elsewhere", "pid": 1, "time": "then"}).encode()


pytestmark = pytest.mark.usefixtures("stopped")


def objects(store):
  return {name: store.read(name) for name in store.sizes()}


def test_who_was_cut_off_uploads_nothing_over_the_one_that_took_over(
  store, tmp_path, said, stopped
):
  one = mirror_of(store, tmp_path / "one", said)
  write(tmp_path / "one", "config.json")
  write_checkpoint(tmp_path / "one", 2)
  one.push()
  two = mirror_of(store, tmp_path / "two", said)
  for name in ("one", "two"):
    write_checkpoint(tmp_path / name, 4, name)
  write(tmp_path / "two", "status.json", "done")
  two.push()
  before = objects(store)
  for _ in range(2):
    with pytest.raises(StoreError, match="written, or emptied, elsewhere meanwhile"):
      one.push()
  assert objects(store) == before and len(stopped) == 1


def test_the_lease_is_asked_before_anything_is_uploaded(mirrored, store, tmp_path):
  """Not only by the thread that renews it."""
  with pytest.raises(StoreError, match="taken over by process 1 on elsewhere"), mirrored(tmp_path):
    write(tmp_path, "config.json")
    store.write("lease.json", OTHER)
  assert store.read("config.json") is None and store.read("lease.json")[0] == OTHER


@pytest.mark.parametrize("taken", ["lease.json", "mirror.json"])
def test_who_is_overtaken_while_it_uploads_writes_no_index(
  mirrored, store, tmp_path, monkeypatch, taken
):
  content = {"lease.json": OTHER, "mirror.json": index_lib.EMPTY.after({}).encoded()}[taken]
  real, written = store.upload, []

  def upload(name, path):
    real(name, path)
    store.write(taken, content)
    written.append(store.read("mirror.json"))

  monkeypatch.setattr(store, "upload", upload)
  with pytest.raises(StoreError, match=r"taken over|meanwhile"), mirrored(tmp_path):
    write(tmp_path, "config.json")
  assert written == [store.read("mirror.json")]


def test_an_index_is_replaced_on_condition(store, tmp_path, said, monkeypatch):
  """Between the last look and the writing another one may come."""
  mirror, real = mirror_of(store, tmp_path, said), store.write
  other = index_lib.EMPTY.after({}).encoded()

  def write_late(name, content, replaces="any"):
    real(name, other)
    return real(name, content, replaces)

  write(tmp_path, "config.json")
  monkeypatch.setattr(store, "write", write_late)
  with pytest.raises(StoreError, match="meanwhile"):
    mirror.push()
  assert store.read("mirror.json")[0] == other


@pytest.mark.parametrize("told", [False, True], ids=["no answer", "tried again by the library"])
def test_an_index_whose_answer_was_lost_is_known_for_ones_own(store, tmp_path, said, told):
  mirror, real, lost = mirror_of(store, tmp_path, said), store.write, []

  def write_twice(name, content, replaces="any"):
    tag = real(name, content, replaces)
    if name == "mirror.json" and not lost:
      lost.append(name)
      if told:
        return real(name, content, replaces)  # which has another tag by now
      raise StoreError(f"{ADDRESS}: the server does not answer")
    return tag

  store.write = write_twice
  write(tmp_path, "config.json")
  for _ in range(2):
    problem = mirror._try()
    assert not problem or (not told and "does not answer" in problem)
    write(tmp_path, "metrics.jsonl")
  store.write = real
  mirror.push()
  assert lost and mirror._try() == ""
  assert index_lib.in_store(store).files.keys() == {"config.json", "metrics.jsonl"}


def test_long_uploads_end_with_the_lease(mirrored, store, tmp_path, monkeypatch):
  """One after another, each asks for a lease that was not renewed for long."""
  monkeypatch.setattr(mirror_lib, "STALE_SECONDS", 0.0)
  monkeypatch.setattr(index_lib, "AT_ONCE", 1)
  real, uploaded = Failing.upload, []

  def upload(self, name, path):
    uploaded.append(name)
    real(self, name, path)
    self.write("lease.json", OTHER)

  monkeypatch.setattr(Failing, "upload", upload)
  with pytest.raises(StoreError, match="taken over"), mirrored(tmp_path):
    for name in ("config.json", "manifest.json", "metrics.jsonl"):
      write(tmp_path, name)
  assert len(uploaded) == 1
