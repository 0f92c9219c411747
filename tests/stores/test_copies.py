"""What readers and evaluation jobs see of a run: all that is whole, nothing set aside."""

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import ADDRESS, mirror_of, rename, texts, write, write_checkpoint

from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores.copies import Copy
from beyond_outliers.stores.store import StoreError


def test_results_of_evaluation_jobs_go_both_ways(store, tmp_path, said):
  mirror = mirror_of(store, tmp_path / "run", said)
  one, two = (Copy(ADDRESS, store, tmp_path / name) for name in ("one", "two"))
  write(tmp_path / "one", "eval/a.json", "of one")
  one.publish()
  two.refresh()
  assert texts(tmp_path / "two") == {"eval/a.json": "of one"}
  write(tmp_path / "two", "tensorboard/eval/events", "of two")
  two.publish()
  write(tmp_path / "run", "config.json")
  mirror.push()
  one.refresh()
  assert texts(tmp_path / "one").keys() == {"eval/a.json", "tensorboard/eval/events", "config.json"}
  write(tmp_path / "two", "tensorboard/eval/events", "of two, and more")
  two.refresh()
  assert texts(tmp_path / "two")["tensorboard/eval/events"].endswith("more"), "not yet published"


def test_the_newest_sound_checkpoint_is_fetched(store, tmp_path, said):
  mirror = mirror_of(store, tmp_path / "run", said)
  for step in (2, 4):
    write_checkpoint(tmp_path / "run", step)
  mirror.push()
  store.write("checkpoints/4/state/d/array", b"y")
  copy = Copy(ADDRESS, store, tmp_path / "copy")
  copy.fetch_checkpoint(None)
  assert {path.name for path in (tmp_path / "copy/checkpoints").iterdir()} == {"2", "4"}
  assert not list((tmp_path / "copy").glob(".fetching-*"))
  assert len(copy.stamps(2)) == 3 and not copy.stamps(3)


def test_a_small_file_of_a_checkpoint_is_read_alone(store, tmp_path, said, monkeypatch):
  mirror, name = mirror_of(store, tmp_path / "run", said), "checkpoints/2/clock/metadata"
  write_checkpoint(tmp_path / "run", 2, "one")
  mirror.push()
  copy, real, asked = Copy(ADDRESS, store, tmp_path / "copy"), store.read, []
  monkeypatch.setattr(store, "read", lambda name: asked.append(name) or real(name))
  assert [copy.read(name) for _ in range(2)] == 2 * [b"one"] and asked.count(name) == 1
  write_checkpoint(tmp_path / "run", 2, "another")
  mirror.push()
  assert copy.read(name) == b"another" and not (tmp_path / "copy/checkpoints").exists()
  store.broken = ("checkpoints",)
  assert copy.read(name) == b"another" and copy.read("checkpoints/3/clock/metadata") == b""


def test_a_reader_goes_on_with_what_it_has_while_the_store_is_away(
  store, tmp_path, said, monkeypatch
):
  write_checkpoint(tmp_path / "run", 2)
  mirror_of(store, tmp_path / "run", said).push()
  copy = Copy(ADDRESS, store, tmp_path / "copy")

  def fail(name):
    raise StoreError("the server does not answer")

  monkeypatch.setattr(store, "read", fail)
  assert copy.steps() == [2]
  with pytest.raises(WorkdirError, match="does not answer"):
    Copy(ADDRESS, store, tmp_path / "other")


def test_results_that_were_set_aside_come_back_from_no_copy(run, mirrored, store, tmp_path):
  _, folder = run
  address, (one, two) = ADDRESS, (tmp_path / "one", tmp_path / "two")
  job = Copy(address, store, one)
  for name in ("eval/2-none.json", "eval/4-none.json"):
    write(one, name, "of a job")
  job.publish()
  Copy(address, store, two)  # has them from the store
  with mirrored(folder):
    rename(folder, "eval/4-none.json", "aside-2-1/eval/4-none.json")
    rename(folder, "checkpoints/4", "aside-2-1/checkpoints/4")
  write(two, "eval/4-rtn.json", "of another job, not yet published")
  for place in (one, two, one):  # later processes
    job = Copy(address, store, place)
    job.publish()
    assert "eval/4-none.json" not in {*store.sizes(), *texts(place)}
  assert store.sizes("eval").keys() == {"eval/2-none.json", "eval/4-rtn.json"}
  write(one, "eval/4-none.json", "of the new step 4")
  Copy(address, store, one).publish()
  assert store.read("eval/4-none.json")[0] == b"of the new step 4"


def test_a_copy_has_nothing_of_what_was_set_aside(run, store, tmp_path):
  mirror, folder = run
  rename(folder, "checkpoints/4", "checkpoints/damaged-4-1")
  write(folder, "aside-2-1/metrics.jsonl")
  mirror.push()
  copy = Copy(ADDRESS, store, tmp_path / "copy")
  copy.fetch_checkpoint(None)
  assert not [name for name in texts(copy.folder) if "aside" in name or "damaged" in name]
  assert copy.steps() == [2]
