"""A folder and its store, by a store in memory that knows conditions as S3 and GCS do: what a run
writes is there, whole or not at all, whatever fails; and nobody's work is lost."""

import json
import os
import re
import threading

import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")

from run_folders import ADDRESS, mirror_of, texts, write, write_checkpoint

from beyond_outliers import stores
from beyond_outliers.checkpoint.retention import TEMPORARY
from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores import lease as lease_lib
from beyond_outliers.stores import mirror as mirror_lib
from beyond_outliers.stores.copies import Copy
from beyond_outliers.stores.store import ChangedError, StoreError


def test_a_run_that_moves_finds_all_that_it_left(mirrored, store, tmp_path):
  with mirrored(tmp_path / "here"):
    write(tmp_path / "here", "config.json", '{"steps": 2}')
    write(tmp_path / "here", "metrics.jsonl", '{"step": 1}\n')
    write(tmp_path / "here", "lock", "mine")
    write(tmp_path / "here", "status.json.1-2.tmp")
    write(tmp_path / "here", "checkpoints/4.orbax-checkpoint-tmp-1/state/d/array")
    write_checkpoint(tmp_path / "here", 2)
  assert not [name for name in store.sizes() if "tmp" in name or name in ("lock", "lease.json")]
  with mirrored(tmp_path / "there"):
    left = texts(tmp_path / "here")
    assert texts(tmp_path / "there") == left and "checkpoints/2/state/d/array" in left
    with (tmp_path / "there/metrics.jsonl").open("a") as file:
      file.write('{"step": 2}\n')
    write_checkpoint(tmp_path / "there", 3)
    (tmp_path / "there/checkpoints/2/sha256.json").unlink()  # as a deletion under way looks
  with mirrored(tmp_path / "here"):
    assert (tmp_path / "here/metrics.jsonl").read_text().count("\n") == 2


def test_an_unchanged_folder_is_neither_fetched_nor_uploaded_again(mirrored, store, tmp_path):
  with mirrored(tmp_path):
    write(tmp_path, "config.json")
  store.broken = ("config",)
  index = store.read("mirror.json")
  with mirrored(tmp_path):
    pass
  assert store.read("mirror.json") == index


def test_a_checkpoint_appears_once_all_of_it_is_there(store, tmp_path, said):
  mirror, copy = mirror_of(store, tmp_path / "here", said), Copy(ADDRESS, store, tmp_path / "copy")
  write_checkpoint(tmp_path / "here", 2, sealed=False)
  mirror.push()
  assert copy.steps() == [], "it has no sums yet"
  write_checkpoint(tmp_path / "here", 2)
  write(tmp_path / "here", "status.json", '{"status": "done"}')
  store.broken = ("checkpoints/2/clock",)
  with pytest.raises(StoreError):
    mirror.push()
  assert copy.steps() == [] and "checkpoints/2/state/d/array" in store.sizes()
  assert store.read("status.json") is None, "nobody hears that a run is done before its checkpoint"
  store.broken = ()
  mirror.push()
  assert copy.steps() == [2] and store.read("status.json") is not None


def test_readers_do_not_see_a_temporary_checkpoint_and_the_run_does(
  mirrored, store, tmp_path, said
):
  mirror, copy = mirror_of(store, tmp_path / "here", said), Copy(ADDRESS, store, tmp_path / "copy")
  for step in (2, 3):
    write_checkpoint(tmp_path / "here", step)
  write(tmp_path / "here/checkpoints/3", f"{TEMPORARY}/metadata")
  mirror.push()
  assert copy.steps() == [2]
  copy.fetch_checkpoint(None)
  assert [path.name for path in (tmp_path / "copy/checkpoints").iterdir()] == ["2"]
  with mirrored(tmp_path / "elsewhere"):
    names = {path.name for path in (tmp_path / "elsewhere/checkpoints").iterdir()}
  assert names == {"2", "3"}


def test_what_is_deleted_here_is_deleted_there(store, tmp_path, said):
  mirror, copy = mirror_of(store, tmp_path / "here", said), Copy(ADDRESS, store, tmp_path / "copy")
  for step in (2, 4):
    write_checkpoint(tmp_path / "here", step)
  mirror.push()
  copy.fetch_checkpoint(2)
  for path in sorted((tmp_path / "here/checkpoints/2").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  mirror.push()
  assert not any(name.startswith("checkpoints/2") for name in store.sizes())
  assert copy.steps() == [4] and not (tmp_path / "copy/checkpoints/2").exists()


def test_a_store_that_fails_stops_no_run_and_is_tried_again(mirrored, store, tmp_path, said):
  store.broken = ("metrics",)
  refused = pytest.raises(StoreError, match=r"does not answer; not uploaded: metrics\.jsonl; it is")
  with refused, mirrored(tmp_path):
    write(tmp_path, "metrics.jsonl")
  assert [text for text in said if "goes on in" in text] == said, "once"
  store.broken = ()
  with mirrored(tmp_path):
    pass
  assert store.read("metrics.jsonl") is not None


def test_an_error_of_the_run_is_the_one_that_is_seen(mirrored, store, tmp_path):
  store.broken = ("metrics",)
  with pytest.raises(ZeroDivisionError), mirrored(tmp_path):
    write(tmp_path, "metrics.jsonl")
    write(tmp_path, "status.json")
    raise ZeroDivisionError
  assert "lease.json" not in store.sizes()


def test_two_folders_that_went_apart_both_stay(mirrored, store, tmp_path, said):
  store.broken = ("metrics",)
  with pytest.raises(StoreError), mirrored(tmp_path / "here"):
    write(tmp_path / "here", "metrics.jsonl", "mine")
  store.broken = ()
  with mirrored(tmp_path / "there"):
    write(tmp_path / "there", "metrics.jsonl", "theirs")
  with mirrored(tmp_path / "here"):
    assert (tmp_path / "here/metrics.jsonl").read_text() == "theirs"
  (aside,) = tmp_path.glob("here.aside-*")
  assert (aside / "metrics.jsonl").read_text() == "mine" and str(aside) in " ".join(said)


def test_a_store_that_was_emptied_begins_anew_and_the_folder_is_kept(mirrored, store, tmp_path):
  for text in ("first", "second"):
    with mirrored(tmp_path / "run"):
      write(tmp_path / "run", "config.json", text)
  store.delete(list(store.sizes()))
  with mirrored(tmp_path / "run"):
    assert texts(tmp_path / "run") == {}
  (aside,) = tmp_path.glob("run.aside-*")
  assert (aside / "config.json").read_text() == "second"


def test_parts_that_a_killed_process_left_are_swept_and_nothing_else(mirrored, store, tmp_path):
  with mirrored(tmp_path / "here"):
    write_checkpoint(tmp_path / "here", 2)
  for name in ("checkpoints/4/state/d/array", "eval/2-none.json", "notes.txt"):
    store.write(name, b"x")
  with mirrored(tmp_path / "there"):
    assert (tmp_path / "there/eval/2-none.json").read_text() == "x"
  assert "checkpoints/4/state/d/array" not in store.sizes()
  assert {"notes.txt", "eval/2-none.json"} <= store.sizes().keys()


def test_what_was_killed_before_its_first_index_goes_on(mirrored, store, tmp_path, said):
  mirror_of(store, tmp_path / "here", said)
  store.write("config.json", b"uploaded, when it was killed")
  with mirrored(tmp_path / "there"):
    write(tmp_path / "there", "config.json", "anew")
  assert store.read("config.json")[0] == b"anew"


def test_a_run_that_was_copied_there_by_hand_is_not_written_over(mirrored, store, tmp_path):
  store.write("config.json", b"{}")
  refused = pytest.raises(WorkdirError, match=r"holds a run without mirror\.json")
  with refused, mirrored(tmp_path):
    pass
  assert store.sizes() == {"config.json": 2}


@pytest.mark.parametrize(
  "content", [b"", b"[]", b'{"id": "1"}', b'{"id": "1", "previous": "", "files": {"../x": [1, 2]}}']
)
def test_an_index_that_is_none_is_refused(mirrored, store, tmp_path, content):
  store.write("mirror.json", content)
  refused = pytest.raises(WorkdirError, match=r"mirror\.json is not the index that was written")
  with refused, mirrored(tmp_path / "run"):
    pass
  with pytest.raises(WorkdirError, match="is not the index"):
    Copy(ADDRESS, store, tmp_path / "copy")
  assert not (tmp_path / "x").exists()


# ---- the lease


def foreign_lease(**differs):
  holder = {"id": "other", "host": "elsewhere", "pid": 1, "machine": "another boot", "time": "then"}
  return json.dumps({**holder, **differs}).encode()


def test_who_renews_the_lease_keeps_it(mirrored, store, tmp_path, monkeypatch):
  monkeypatch.setattr(lease_lib, "STALE_SECONDS", 20.0)
  store.write("lease.json", foreign_lease())
  renewed = threading.Timer(0.3, store.write, ("lease.json", foreign_lease(time="now")))
  renewed.start()
  refused = pytest.raises(WorkdirError, match=r"in use by process 1 on elsewhere \(last sign now\)")
  with refused, mirrored(tmp_path):
    pass
  assert b"elsewhere" in store.read("lease.json")[0]


@pytest.mark.parametrize("content", [foreign_lease(), b"", b"[]"], ids=["foreign", "empty", "list"])
def test_a_lease_that_nobody_renews_is_taken_over(mirrored, store, tmp_path, content):
  store.write("lease.json", content)
  with mirrored(tmp_path):
    assert json.loads(store.read("lease.json")[0])["pid"] == os.getpid()
  assert store.read("lease.json") is None


def test_a_lease_of_a_dead_process_of_this_machine_waits_for_nothing(
  mirrored, store, tmp_path, monkeypatch, said
):
  monkeypatch.setattr(lease_lib, "STALE_SECONDS", 3600.0)
  store.write("lease.json", foreign_lease(machine=lease_lib._machine(), pid=2**22 + 1))
  with mirrored(tmp_path):
    assert not said


def test_a_run_whose_lease_was_taken_stops_and_uploads_nothing_more(
  mirrored, store, tmp_path, monkeypatch, said
):
  stopped = threading.Event()
  monkeypatch.setattr(lease_lib, "RENEW_SECONDS", 0.01)
  monkeypatch.setattr(mirror_lib.os, "kill", lambda pid, number: stopped.set())
  with pytest.raises(StoreError, match=r"taken over by process 1 on elsewhere"), mirrored(tmp_path):
    store.write("lease.json", foreign_lease())
    assert stopped.wait(10)
    write(tmp_path, "metrics.jsonl")
  assert store.read("metrics.jsonl") is None
  assert b"elsewhere" in store.read("lease.json")[0], "it is the other's"


def test_an_object_is_replaced_on_condition(store):
  tag = store.write("x", b"1", replaces=None)
  with pytest.raises(ChangedError):
    store.write("x", b"2", replaces=None)
  other = store.write("x", b"3", replaces=tag)
  with pytest.raises(ChangedError):
    store.write("x", b"4", replaces=tag)
  assert store.read("x") == (b"3", other)


BAD = {
  "s3://": "expected s3://BUCKET/PATH",
  "s3:///run": "expected s3://BUCKET/PATH",
  "s3://bucket": "expected s3://BUCKET/PATH",
  "gs://bucket/../run": "expected gs://BUCKET/PATH",
  "gs://bucket//run": "expected gs://BUCKET/PATH",
  "s3://key:secret@bucket/run": "takes neither user nor key",
  "s3://bucket/run?versionId=1": "takes no '?'",
  "http://host/run": "not an address of a known kind",
  "az://bucket/run": "not an address of a known kind",
}


@pytest.mark.parametrize("address", BAD)
def test_what_is_no_address_is_refused(address):
  with pytest.raises(WorkdirError, match=re.escape(BAD[address])) as refused:
    stores.check_address(address)
  assert "\n" not in str(refused.value) and "secret" not in str(refused.value)
