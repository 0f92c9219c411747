"""Sums of a folder's files: what differs is named, and a name does not leave the folder."""

import errno
import json
import os
import pathlib
import stat
import threading

import pytest

from beyond_outliers.config import sums
from beyond_outliers.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "below").mkdir()
  for name in ("a", "below/b"):
    (tmp_path / name).write_text(name)
  written = {name: sums.file_sha256(tmp_path / name) for name in ("a", "below/b")}
  sums.write_folder_sums(tmp_path, written)
  return tmp_path


def test_the_first_difference_is_named(folder):
  (folder / "c").write_text("of nobody's concern")
  assert sums.folder_mismatch(folder) == ""
  (folder / "below" / "b").write_text("below/B")
  assert sums.folder_mismatch(folder) == "below/b does not match its SHA-256 sum"
  assert sums.folder_mismatch(folder, ["a", "c"]) == ""
  with pytest.raises(ConfigError, match=r"below/b does not .*; fetch .*, or remove sha256.json if"):
    sums.check_folder(folder)
  (folder / "below" / "b").unlink()
  assert sums.folder_mismatch(folder) == "below/b is missing"
  (folder / sums.SUMS).unlink()
  assert sums.folder_mismatch(folder) == ""


@pytest.mark.parametrize(
  "content",
  ["", "{}", "[1]", "[" * 100_000, "\ufffd{", '{"a": ', '{"../a": ""}', '{"/a": ""}', '{"": ""}'],
)
def test_sums_that_are_none_are_refused(folder, content):
  (folder / sums.SUMS).write_text(content)
  assert sums.folder_mismatch(folder) == "sha256.json is not readable"


@pytest.mark.parametrize("value", [{"a": 1, "b": {"c": [2.5, None]}}, {}])
def test_a_sealed_object_is_told_from_an_altered_one_and_an_older_one_is_taken(value):
  sealed = json.dumps(sums.sealed(value))
  assert sums.unsealed(json.loads(sealed)) == (value, "") == sums.unsealed(value)
  for place in range(len(sealed)):
    for bit in range(8):
      content = bytearray(sealed.encode())
      content[place] ^= 1 << bit
      try:
        found = json.loads(content)
      except ValueError:
        continue
      assert not isinstance(found, dict) or sums.unsealed(found)[1], content


def test_a_name_stays_in_its_folder():
  assert all(map(sums.stays_inside, ("a", "a/b", "a..b", "{directory}/x", "...")))
  outside = ("", ".", "/", "/a", "..", "../a", "a/../../b", "a/..", None, 3, ["a"])
  assert not any(map(sums.stays_inside, outside))


def test_where_nothing_can_be_written_the_first_error_is_told(folder, monkeypatch):
  def unlink(path, missing_ok=False):
    raise OSError("read-only, and so is all else")

  monkeypatch.setattr(pathlib.Path, "unlink", unlink)
  with pytest.raises(OSError, match=r"^read-only$"), sums.replaced(folder / "a"):
    raise OSError("read-only")


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(folder):
  with pytest.raises(ZeroDivisionError), sums.replaced(folder / "a") as temporary:
    temporary.write_text("begun")
    assert (folder / "a").read_text() == "a"
    raise ZeroDivisionError
  assert (folder / "a").read_text() == "a" and not list(folder.glob("*.tmp"))
  with sums.replaced(folder / "a") as temporary:
    temporary.write_text("new")
  assert (folder / "a").read_text() == "new"
  assert json.loads((folder / sums.SUMS).read_text()).keys() == {"a", "below/b"}


def test_two_threads_that_replace_a_file_do_not_take_it_from_each_other(folder):
  """As a run and its watchdog, of status.json."""

  def write(text):
    with sums.replaced(folder / "a") as temporary:
      temporary.write_text(text)

  with sums.replaced(folder / "a") as temporary:
    temporary.write_text("one")
    other = threading.Thread(target=write, args=["two"])
    other.start()
    other.join()
    assert (folder / "a").read_text() == "two"
  assert (folder / "a").read_text() == "one" and not list(folder.glob("*.tmp"))


def test_a_file_system_that_cannot_sync_a_folder_is_written_to(folder, monkeypatch):
  sync = os.fsync

  def fsync(number):
    if stat.S_ISDIR(os.fstat(number).st_mode):
      raise OSError(errno.EINVAL, "Invalid argument")
    sync(number)

  monkeypatch.setattr(os, "fsync", fsync)
  with sums.replaced(folder / "a") as temporary:
    temporary.write_text("new")
  assert (folder / "a").read_text() == "new"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
  names = ["status.json.123-456.tmp", "sha256.json.7-8.tmp", "mine.tmp", "a.1-2.tmp.txt", "a.json"]
  for name in names:
    (tmp_path / name).write_text(name)
  with sums.replaced(tmp_path / "b") as living:
    living.write_text("b")
    assert sums.UNFINISHED.fullmatch(living.name), "what is looked for is what is written"
  sums.remove_stale(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "a.1-2.tmp.txt",
    "a.json",
    "b",
    "mine.tmp",
  ]
