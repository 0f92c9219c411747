"""What is deleted from a store: what the run deleted, and nothing that its folder merely lacks."""

import os
import shutil

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import ADDRESS, mirror_of, rename, texts, write, write_checkpoint

from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores.copies import Copy
from beyond_outliers.stores.store import Store, StoreError

pytestmark = pytest.mark.usefixtures("stopped")


def in_store(store):
  """What whoever reads the store would find, by the index."""
  return {name for name in index_lib.in_store(store).files if name in store.sizes()}


@pytest.mark.parametrize(
  "lost",
  ["checkpoints", "checkpoints/2", "checkpoints/4", "checkpoints/4/state/d/array", "config.json"],
)
def test_what_a_folder_lost_between_two_starts_is_fetched(
  run, mirrored, store, tmp_path, said, lost
):
  _, folder = run
  before, names = texts(folder), in_store(store)
  shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
  with mirrored(folder):
    assert texts(folder) == before
  assert in_store(store) == names
  assert not list(tmp_path.glob("*.aside-*"))


def test_a_file_that_was_cut_off_is_fetched_and_one_that_is_newer_stays(run, mirrored, store):
  _, folder = run
  path = folder / "checkpoints/4/state/d/array"
  times = path.stat().st_mtime_ns
  path.write_bytes(b"")
  os.utime(path, ns=(times, times))
  write(folder, "metrics.jsonl", "a longer one, of a run that was killed before it was uploaded")
  with mirrored(folder):
    assert path.read_text() == "4"
    assert (folder / "metrics.jsonl").read_text().startswith("a longer one")
  assert store.read("metrics.jsonl")[0].startswith(b"a longer one")


def test_a_start_that_is_refused_takes_nothing_from_the_store(run, mirrored, store):
  _, folder = run
  names = in_store(store)
  with pytest.raises(ZeroDivisionError), mirrored(folder):
    shutil.rmtree(folder / "checkpoints")
    raise ZeroDivisionError
  assert in_store(store) == names


@pytest.mark.parametrize(
  "lost", ["", "checkpoints", "checkpoints/4", "config.json"], ids=lambda name: name or "all"
)
def test_a_folder_that_loses_some_of_a_run_takes_nothing_from_the_store(
  run, store, said, stopped, lost
):
  mirror, folder = run
  names = in_store(store)
  for path in [folder / lost] if lost else list(folder.iterdir()):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  for _ in range(2):
    with pytest.raises(StoreError, match=r"has lost .*the same command fetches it") as refused:
      mirror.push()
    write_checkpoint(folder, 6)
  assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
  assert in_store(store) == names
  assert len([text for text in said if "has lost" in text]) == 1 and len(stopped) == 1


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(run, store, monkeypatch):
  mirror, _ = run
  names, real = in_store(store), os.scandir

  def fail(path="."):
    if str(path).endswith("checkpoints"):
      raise OSError(5, "Input/output error", str(path))
    return real(path)

  with monkeypatch.context() as patch:
    patch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="Input/output error"):
      mirror.push()
  mirror.push()
  assert in_store(store) == names


def test_sums_that_cannot_be_read_make_no_partial_checkpoint(run, store, monkeypatch):
  mirror, folder = run
  names, real = in_store(store), index_lib.pathlib.Path.read_bytes

  def fail(path):
    if path == folder / "checkpoints/2/sha256.json":
      raise OSError(5, "Input/output error", str(path))
    return real(path)

  with monkeypatch.context() as patch:
    patch.setattr(index_lib.pathlib.Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
      mirror.push()
  assert in_store(store) == names


def test_an_error_of_the_folder_at_the_end_is_one_line(run, mirrored, store, monkeypatch):
  _, folder = run

  def fail(path):
    raise OSError(5, "Input/output error", str(path))

  with pytest.raises(StoreError, match=r"Input/output error.* it is in"), mirrored(folder):
    monkeypatch.setattr(index_lib, "scan", fail)


def test_an_older_checkpoint_stays_until_a_newer_one_is_in_the_store(run, store):
  mirror, folder = run
  shutil.rmtree(folder / "checkpoints/2")
  shutil.rmtree(folder / "checkpoints/4")
  write_checkpoint(folder, 6, sealed=False)  # as Orbax commits it, and deletes those before
  mirror.push()
  assert index_lib.steps_named(in_store(store)) == {2, 4}
  write_checkpoint(folder, 6)
  store.broken = ("checkpoints/6/clock",)
  with pytest.raises(StoreError):
    mirror.push()
  assert index_lib.steps_named(in_store(store)) == {2, 4}
  store.broken = ()
  mirror.push()
  assert index_lib.steps_named(store.sizes()) == index_lib.steps_named(in_store(store)) == {6}


def test_a_checkpoint_that_lacks_a_file_stays_in_the_store_beside_a_newer_one(run, store):
  mirror, folder = run
  names = in_store(store)
  (folder / "checkpoints/2/state/d/array").unlink()
  write_checkpoint(folder, 6)
  mirror.push()
  assert names < in_store(store)


def test_without_sums_only_whole_checkpoints_leave(store, tmp_path, said):
  mirror, folder = mirror_of(store, tmp_path, said, sealed=False), tmp_path
  for step in (2, 4):
    write_checkpoint(folder, step, sealed=False)
  mirror.push()
  (folder / "checkpoints/4/state/d/array").unlink()
  shutil.rmtree(folder / "checkpoints/2")
  mirror.push()
  assert len(in_store(store)) == 2 and index_lib.steps_named(in_store(store)) == {4}


def test_what_a_run_set_aside_leaves_the_store_and_comes_back_to_no_start(
  run, mirrored, store, tmp_path
):
  mirror, folder = run
  write(folder, "eval/4-none.json", "of the old step 4")
  mirror.push()
  status = store.read("status.json")
  rename(folder, "status.json", "aside-2-1/status.json")
  rename(folder, "eval/4-none.json", "aside-2-1/eval/4-none.json")
  rename(folder, "checkpoints/4", "aside-2-1/checkpoints/4")
  # Killed before it was uploaded; and then, once more, when some of it was.
  with mirrored(folder):
    assert not (folder / "eval/4-none.json").exists() and not (folder / "checkpoints/4").exists()
  assert index_lib.steps_named(store.sizes()) == {2} and not store.sizes("eval")
  assert status is not None and store.read("status.json") is None
  with mirrored(tmp_path / "there"):
    assert "aside-2-1/checkpoints/4/state/d/array" in texts(tmp_path / "there"), "nothing is lost"
    write_checkpoint(tmp_path / "there", 4, "another")
    write(tmp_path / "there", "eval/4-none.json", "of the new step 4")
  with mirrored(tmp_path / "third"):
    assert (tmp_path / "third/checkpoints/4/state/d/array").read_text() == "another"
    assert (tmp_path / "third/eval/4-none.json").read_text() == "of the new step 4"


def test_a_damaged_checkpoint_that_is_the_only_one_stays_in_the_store(run, store):
  mirror, folder = run
  rename(folder, "checkpoints/4", "checkpoints/damaged-4-1")
  mirror.push()
  assert index_lib.steps_named(store.sizes()) == {2}
  rename(folder, "checkpoints/2", "checkpoints/damaged-2-2")
  mirror.push()
  assert index_lib.steps_named(in_store(store)) == {2}


class Killed(Store):
  """A store whose process dies at the upload of a file."""

  at = ""

  def upload(self, name, path, replaces="any"):
    if self.at and name.startswith(self.at):
      raise KeyboardInterrupt
    return super().upload(name, path, replaces)


def test_a_checkpoint_appears_with_the_rows_that_it_knows(tmp_path, said):
  from obstore.store import MemoryStore

  store = Killed(ADDRESS, MemoryStore(), "run")
  mirror, folder = mirror_of(store, tmp_path / "run", said), tmp_path / "run"
  write(folder, "metrics.jsonl", "1\n")
  mirror.push()
  write(folder, "metrics.jsonl", "1\n2\n")
  write_checkpoint(folder, 2)
  store.at = "metrics.jsonl"
  with pytest.raises(KeyboardInterrupt):
    mirror.push()
  assert Copy(ADDRESS, store, tmp_path / "copy").steps() == []
  store.at = ""
  mirror.push()
  assert Copy(ADDRESS, store, tmp_path / "copy").steps() == [2]
  # The other way round: what was gone back behind is out of the index before its rows are.
  rename(folder, "checkpoints/2", "aside-0-1/checkpoints/2")
  write(folder, "metrics.jsonl", "1\n")
  store.at = "metrics.jsonl"
  with pytest.raises(KeyboardInterrupt):
    mirror.push()
  assert Copy(ADDRESS, store, tmp_path / "copy").steps() == []


def test_results_that_were_set_aside_elsewhere_come_back_from_no_folder(
  run, mirrored, store, tmp_path
):
  _, folder = run
  store.write("eval/4-none.json", b"of a job")
  with mirrored(folder):
    pass
  with mirrored(tmp_path / "there"):
    rename(tmp_path / "there", "eval/4-none.json", "aside-2-1/eval/4-none.json")
    rename(tmp_path / "there", "checkpoints/4", "aside-2-1/checkpoints/4")
  store.write("eval/2-none.json", b"of a job")
  with mirrored(folder):
    assert [path.name for path in (folder / "eval").iterdir()] == ["2-none.json"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
  assert store.sizes("eval").keys() == {"eval/2-none.json"}
  (aside,) = tmp_path.glob("run.aside-*")
  assert texts(aside) == {"eval/4-none.json": "of a job"}
