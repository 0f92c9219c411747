"""Folder of a run: an impossible place for it, or files in it that are not what was written, are
reported in one line before anything else begins."""

import errno
import json
import os
import shutil
import tempfile

import pytest
from etils import epath

from beyond_outliers import workdir as workdir_lib
from beyond_outliers import writers
from beyond_outliers.errors import WorkdirError
from beyond_outliers.evaluate import results


def test_a_glob_takes_its_folder_by_the_letter(tmp_path):
  for name in ("a", "[ab]", "*"):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"of {name}.json").touch()
  for name in ("a", "[ab]", "*"):
    folder = workdir_lib.FolderPath(tmp_path) / name
    (found,) = folder.glob("*.json")
    assert found.name == f"of {name}.json" and found.parent == folder
    assert type(epath.Path(folder) / "x") is workdir_lib.FolderPath, "libraries make epaths of it"


def test_results_are_found_in_a_folder_with_brackets(tmp_path):
  store = results.ResultStore(tmp_path / "lr=[1e-3]")
  rest = {"metrics": {"loss": 1.0}, "size_bytes": 1, "seconds": {}}
  cell = {"step": 1, "recipe": "none", "method": "none", "settings": {"version": 2}, **rest}
  store.write(1, "none", "none", {"version": 2}, cell)
  assert [found["metrics"] for found in store.cells()] == [{"loss": 1.0}]


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert str(workdir_lib.Workdir("~/run").path) == str(tmp_path / "run")


@pytest.mark.parametrize("path", ["s3://bucket/run", "http://host/run", "/gs/bucket/run"])
def test_what_libraries_take_for_an_object_store_is_refused(path):
  with pytest.raises(WorkdirError, match=rf"workdir {path}: .* give a mounted folder"):
    workdir_lib.Workdir(path)


# where the workdir is -> what is said of it; {file} is a file
UNUSABLE = {
  "{file}": "File exists",
  "{file}/run": "Not a directory",
  "{file}/../" + "x" * 300: "File name too long",
  "/proc/run": "No such file or directory",
  "/dev/null/run": "Not a directory",
}


@pytest.mark.parametrize("path", UNUSABLE)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, path):
  (tmp_path / "file").write_text("x")
  workdir = workdir_lib.Workdir(path.format(file=tmp_path / "file"))
  with pytest.raises(WorkdirError) as refused, workdir.lock():
    pass
  text = str(refused.value)
  assert text == f"{workdir.path}: {UNUSABLE[path]}; give another --workdir"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
  """Root may write everywhere, so the system's answer is made up."""

  def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  refused = pytest.raises(WorkdirError, match=r": Permission denied; give another --workdir")
  with refused, workdir_lib.Workdir(tmp_path).lock():
    pass


def test_records_that_cannot_be_read_now_are_not_called_damaged(tmp_path, monkeypatch):
  """Of config.json and its like config.files tells."""
  workdir = workdir_lib.Workdir(tmp_path / "run")
  workdir.write("status.json", {"status": "done", "step": 1, "rows": "0"})
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')

  def fail(path):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(type(workdir.path), "read_bytes", fail)
  for read in (workdir.read_rows, lambda: writers.check_last_rows(workdir)):
    with pytest.raises(WorkdirError, match=r"metrics.jsonl: Permission denied; nothing is known"):
      read()


@pytest.mark.parametrize("what", ["moved", "removed", "another's"])
def test_a_folder_that_is_moved_under_its_run_ends_it(tmp_path, what):
  """It would go on, with its rows in one place and its checkpoints in another, or nowhere."""
  workdir = workdir_lib.Workdir(tmp_path / "run")
  with (
    pytest.raises(WorkdirError, match="run was moved or removed while its run was going on"),
    workdir.lock(),
  ):
    workdir.set_status("running", 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    if what == "removed":
      shutil.rmtree(tmp_path / "moved")
    elif what == "another's":
      (tmp_path / "run").mkdir()
    workdir.set_status("running", 2)
  assert not (tmp_path / "run" / "status.json").exists()
  if what == "moved":
    (tmp_path / "moved").rename(tmp_path / "run")
    with workdir.lock():
      workdir.set_status("running", 3)


def test_a_folder_in_the_place_of_the_lock_is_refused(tmp_path):
  (tmp_path / "lock").mkdir()
  refused = pytest.raises(WorkdirError, match=r"/lock: Is a directory; remove it, or give another")
  with refused, workdir_lib.Workdir(tmp_path).lock():
    pass


MANIFEST = {"time": "", "data": {"directory": "", "fingerprint": "", "tokenizer": ""}}
STATUS = {"status": "done", "step": 1}
WHOLE = {"manifest.json": MANIFEST, "status.json": STATUS, "wandb.json": {"id": "x"}}


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
  """Before a run that would need it begins; the status it writes anew."""
  workdir = workdir_lib.Workdir(tmp_path)
  workdir.write(name, WHOLE[name])
  workdir.check()
  assert workdir.read(name) == WHOLE[name]
  key = next(iter(WHOLE[name]))
  rest = {k: v for k, v in WHOLE[name].items() if k != key}
  for value in (None, [], rest, {**rest, key: []}):
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(WorkdirError, match=rf"/{name}: .*; restore it from a copy"):
      workdir.read(name)
  if name == "status.json":
    workdir.check()
  else:
    with pytest.raises(WorkdirError, match=rf"/{name}: "):
      workdir.check()


def test_a_configuration_of_no_run_is_refused_by_name(tmp_path):
  workdir = workdir_lib.Workdir(tmp_path)
  assert workdir.read_config() is None
  workdir.write("config.json", {"size": "nano"})
  with pytest.raises(WorkdirError, match=r"/config.json: .*missing.*; restore it from a copy"):
    workdir.read_config()


ROW = b'{"step": 1, "train/loss": 2.5}'


@pytest.mark.parametrize("last", [b"", b'{"step": 2, "tr', b"\0\0\0", ROW, b"\n\n"], ids=str)
def test_rows_but_for_a_last_line_that_was_cut_off(tmp_path, last):
  (tmp_path / "metrics.jsonl").write_bytes(ROW + b"\n" + last)
  rows = workdir_lib.Workdir(tmp_path).read_rows()
  assert rows == [(ROW.decode(), json.loads(ROW))] * (2 if last == ROW else 1)


@pytest.mark.parametrize(
  "line",
  [
    b"{no}",
    b'{"step": 2, "tr',
    b"[1]",
    b"null",
    b'{"train/loss": 1}',
    b'{"step": "1"}',
    b"\xff",
    b"[" * 100_000,
  ],
  ids=lambda line: str(line)[:20],
)
def test_a_line_that_is_no_row_is_refused_by_number(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([ROW, line, ROW]))
  with pytest.raises(
    WorkdirError, match=r"/metrics.jsonl:2: not a row of metrics, .*; remove the line"
  ):
    workdir_lib.Workdir(tmp_path).check()


def test_rows_that_are_not_there_and_a_folder_in_their_place(tmp_path):
  assert workdir_lib.Workdir(tmp_path).read_rows() == []
  os.mkdir(tmp_path / "metrics.jsonl")
  with pytest.raises(WorkdirError, match=r"/metrics.jsonl: Is a directory; restore"):
    workdir_lib.Workdir(tmp_path).read_rows()


def test_what_is_written_carries_its_own_sum(tmp_path):
  """Also of what JSON holds otherwise: keys that are numbers, and tuples."""
  workdir = workdir_lib.Workdir(tmp_path)
  workdir.write("status.json", {**STATUS, "of": {2: "b", 10: ("a", float("nan"))}})
  text = (tmp_path / "status.json").read_text()
  assert workdir.read("status.json")["of"]["2"] == "b" and '"sha256"' in text
  (tmp_path / "status.json").write_text(text.replace('"b"', '"c"'))
  with pytest.raises(WorkdirError, match=r"/status.json: was altered .*; restore it from a copy"):
    workdir.read("status.json")
  stripped = {key: value for key, value in json.loads(text).items() if key != "sha256"}
  (tmp_path / "status.json").write_text(json.dumps(stripped))
  assert workdir.read("status.json")["status"] == "done", "as of an older version, or on purpose"
