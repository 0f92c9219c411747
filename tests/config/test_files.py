"""Files that a person names: ~ is the home folder in every key that is a path, and JSON that is not
what was written is refused by its name."""

import errno
import fcntl
import json
import math
import os

import numpy as np
import pytest

from beyond_outliers import config
from beyond_outliers.config import files
from beyond_outliers.errors import DataError
from configs import adamw


@pytest.fixture(autouse=True)
def home(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")


@pytest.mark.parametrize(
  "key, value, found",
  [
    ("warm_start", "~/runs/a", "/home/ada/runs/a"),
    ("data.path", "~/c4/*.jsonl", "/home/ada/c4/*.jsonl"),
    ("data.path", "c4/~/a:~.txt", "c4/~/a:~.txt"),
    ("data.directory", "~", "/home/ada"),
    ("data.tokenizer", "sentencepiece:~/a:b.model", "sentencepiece:/home/ada/a:b.model"),
    ("data.tokenizer", "bytes", "bytes"),
    ("data.validation", "path:~/v/*.txt", "path:/home/ada/v/*.txt"),
  ],
)
def test_the_home_folder_in_keys_that_are_paths(key, value, found):
  c = adamw.get_config("nano,data.source=text,data.path=x")
  assert (
    config.flatten(config.to_dict(config.resolve(config.override(c, {key: value}))))[key] == found
  )


def test_a_home_that_nobody_has_is_refused():
  with pytest.raises(config.ConfigError, match=r"data.directory = '~nouser/x': ~ is not .*; give"):
    config.resolve(adamw.get_config("nano,data.directory=~nouser/x"))


@pytest.mark.parametrize(
  "content, problem",
  [
    (b"", "is not the JSON that was written"),
    (b'{"a": {"b', "is not the JSON that was written"),
    (b"\xff\xfe{}", "is not the JSON that was written"),
    (b"\0" * 64, "is not the JSON that was written"),
    (b"[" * 100_000, "is not the JSON that was written"),
    (b'[{"a": 1}]', "is a JSON list, not an object"),
    (b"null", "is a JSON NoneType, not an object"),
    (b'{"a": 1}', "lacks a.b"),
    (b'{"a": {"c": 1}}', "lacks a.b"),
    (b'{"a": {"b": "x"}}', "a.b is 'x', not of type int"),
    (b'{"a": {"b": null}}', "a.b is None, not of type int"),
    (None, "Is a directory"),
  ],
  ids=lambda value: str(value)[:16],
)
def test_json_that_was_not_written_is_refused(tmp_path, content, problem):
  path = tmp_path / "x.json"
  path.mkdir() if content is None else path.write_bytes(content)
  with pytest.raises(DataError) as refused:
    files.read_json(path, DataError, "copy it again", {"a.b": int})
  text = str(refused.value)
  assert text.startswith(f"{path}: {problem}") and text.endswith("; copy it again")


def test_json_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
  """Nor is anybody told to remove or to replace it."""
  (tmp_path / "x.json").write_text("{}")

  def fail(*arguments):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(files, "open", fail, raising=False)
  with pytest.raises(DataError) as refused:
    files.read_json(tmp_path / "x.json", DataError, "delete the folder")
  assert str(refused.value) == (
    f"{tmp_path / 'x.json'}: Permission denied; nothing is known to be damaged: give the same "
    "command once it can be read"
  )


def test_json_that_is_not_there_is_told_apart(tmp_path):
  (tmp_path / "file").write_text("x")
  for path, kind in (("none", FileNotFoundError), ("file/none", NotADirectoryError)):
    with pytest.raises(kind):
      files.read_json(tmp_path / path, DataError, "")
  (tmp_path / "file").write_text('{"a": {"b": null}, "c": 1}')
  kinds = {"a.b": int | None, "a": dict}
  assert files.read_json(os.fspath(tmp_path / "file"), DataError, "", kinds)["c"] == 1


def test_results_are_numbers_that_all_of_json_knows():
  found = {
    "a": np.float32(0.5),
    "b": [math.nan, (np.int64(3), -math.inf)],
    "c": {"d": np.bool_(True)},
  }
  standard = files.standard_json({**found, "e": "NaN", "f": None})
  assert json.loads(json.dumps(standard, allow_nan=False)) == {
    "a": 0.5,
    "b": [None, [3, None]],
    "c": {"d": True},
    "e": "NaN",
    "f": None,
  }


def test_a_lock_is_seen_while_it_is_held_and_not_taken(tmp_path):
  assert not files.is_locked(tmp_path / "lock") and not list(tmp_path.iterdir())
  with (tmp_path / "lock").open("w") as held:
    assert not files.is_locked(tmp_path / "lock")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert files.is_locked(tmp_path / "lock")
  assert not files.is_locked(tmp_path / "lock")
