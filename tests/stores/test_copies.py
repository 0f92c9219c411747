"""What readers and evaluation jobs have of a run that went back."""

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import ADDRESS, rename, texts, write

from beyond_outliers.stores.copies import Copy


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
