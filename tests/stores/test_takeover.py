"""A holder that was cut off: whatever it still does, the run that took over loses nothing."""

import json
import shutil
import time
import types

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import ADDRESS, Failing, mirror_of, write, write_checkpoint

from beyond_outliers.config import sums
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores import lease as lease_lib
from beyond_outliers.stores import mirror as mirror_lib
from beyond_outliers.stores.copies import Copy
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

  def upload(name, path, replaces="any"):
    real(name, path, replaces)
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
    if name == "mirror.json":
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

  def upload(self, name, path, replaces="any"):
    uploaded.append(name)
    self.write("lease.json", OTHER)
    return real(self, name, path, replaces)

  monkeypatch.setattr(Failing, "upload", upload)
  with pytest.raises(StoreError, match="taken over"), mirrored(tmp_path):
    for name in ("config.json", "manifest.json", "metrics.jsonl"):
      write(tmp_path, name)
  assert len(uploaded) == 1


class Late(Failing):
  """A store that what it is to upload under this name reaches only after `meanwhile`."""

  name, meanwhile = "", None

  def upload(self, name, path, replaces="any"):
    if name == self.name and self.meanwhile:
      meanwhile, self.meanwhile = self.meanwhile, None
      meanwhile()
    return super().upload(name, path, replaces)


def overtaken(store, tmp_path, said, name):
  """Objects left by a run that took over and ended while another one's upload of `name`, which then
  still succeeds, was in progress; and the one that was cut off."""
  one = mirror_of(late := Late(ADDRESS, store._backend, "run"), tmp_path / "one", said)
  for file in ("config.json", "manifest.json", "metrics.jsonl", "status.json"):
    write(tmp_path / "one", file, "of both")
  write_checkpoint(tmp_path / "one", 2, "of both")
  one.push()
  left = {}

  def take_over():
    two = mirror_of(store, tmp_path / "two", said)
    write_checkpoint(tmp_path / "two", 4, "of the second")
    for file in ("manifest.json", "metrics.jsonl", "status.json"):
      write(tmp_path / "two", file, "of the second")
    two.push()
    left.update(objects(store))

  for file in ("manifest.json", "metrics.jsonl", "status.json"):
    write(tmp_path / "one", file, "of the first")
  write_checkpoint(tmp_path / "one", 4, "of the first")
  late.name, late.meanwhile = name, take_over
  return left, one


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "status.json"])
def test_an_upload_that_comes_late_takes_no_file_from_the_one_that_took_over(
  store, tmp_path, said, stopped, name
):
  left, one = overtaken(store, tmp_path, said, name)
  with pytest.raises(StoreError, match="elsewhere meanwhile"):
    one.push()
  assert store.read(name)[0] == left[name][0] == b"of the second"


def test_an_upload_that_comes_late_into_a_checkpoint_is_told_by_its_sums(
  store, tmp_path, said, stopped
):
  """Large files are uploaded in parts, which no condition guards."""
  name = "checkpoints/4/state/d/array"
  left, one = overtaken(store, tmp_path, said, name)
  with pytest.raises(StoreError, match="elsewhere meanwhile"):
    one.push()
  assert store.read(name)[0] == b"of the first" and left[name][0] == b"of the second"
  copy = Copy(ADDRESS, store, tmp_path / "copy")
  copy.fetch_checkpoint(None)
  damage = {step: sums.folder_mismatch(copy.folder / f"checkpoints/{step}") for step in (2, 4)}
  assert damage == {2: "", 4: "state/d/array does not match its SHA-256 sum"}
  mirror_of(store, tmp_path / "three", said)
  assert sums.folder_mismatch(tmp_path / "three/checkpoints/4"), "and so does a run"


def test_who_is_overtaken_before_it_deletes_asks_first(run, store):
  """The one that took over may have made anew, under the same name, what is to go."""
  mirror, folder = run
  shutil.rmtree(folder / "checkpoints/2")

  def hold(within):
    if not any("/2/" in name for name in index_lib.in_store(store).files):
      raise lease_lib.TakenError("taken over")

  mirror._hold, names = hold, store.sizes("checkpoints/2").keys()
  with pytest.raises(StoreError, match="taken over"):
    mirror.push()
  assert names and store.sizes("checkpoints/2").keys() == names


@pytest.mark.parametrize("clock", ["monotonic", "time"])
def test_a_machine_that_slept_renews_its_lease_first(store, monkeypatch, clock):
  """Whatever clock went on: on Linux the monotonic one stands still while a machine sleeps."""
  now = dict.fromkeys(("monotonic", "time"), 1000.0)
  clocks = {name: lambda name=name: now[name] for name in now}
  more = {"strftime": time.strftime, "gmtime": time.gmtime}
  monkeypatch.setattr(lease_lib, "time", types.SimpleNamespace(**clocks, **more))
  lease = lease_lib._Lease(store)
  lease.acquire(print)
  assert lease.renew(30.0) == "" and lease.renew(30.0) == ""
  store.write("lease.json", OTHER)
  assert lease.renew(30.0) == ""
  now[clock] += 300.0
  assert "process 1 on elsewhere" in lease.renew(30.0)
