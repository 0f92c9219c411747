"""Files of results: what is no result is named once, and counts as missing."""

import contextlib
import errno
import json
import pathlib
import shutil

import pytest

from beyond_outliers import workdir
from beyond_outliers.config import files
from beyond_outliers.evaluate import results, table

IDENTITY = ("step", "recipe", "method", "settings")
CELL = {
  "step": 2,
  "recipe": "none",
  "method": "none",
  "settings": {"version": 2, "context": 8},
  "metrics": {"loss": 3.5, "bits_per_byte": 2.5},
  "size_bytes": 2**20,
  "seconds": {"evaluate": 1.0},
}
COUNTS = {"split": "test", "scored": 9, "left_out": 1, "truncated": 0}
TASK = {
  **{name: CELL[name] for name in IDENTITY},
  "settings": {**CELL["settings"], results.TASK: "piqa"},
  "scores": {"piqa": {"acc": 0.5, "acc_stderr": 0.25}},
  "examples": {"piqa": COUNTS},
  "left_out": [{"task": "piqa", "example": 3, "reason": "it is empty"}],
  "seconds": 2.0,
  "time": "2026-01-01",
}


def write(store, found):
  store.write(*(found[name] for name in IDENTITY), found)


def without(found, name):
  return {key: value for key, value in found.items() if key != name}


@pytest.mark.parametrize(
  "text",
  [
    json.dumps(CELL)[:-20],
    "",
    "[]",
    "null",
    json.dumps({**CELL, "settings": "none"}),
    json.dumps({**CELL, "step": "two"}),
    json.dumps(without(CELL, "metrics")),
    json.dumps(without(CELL, "size_bytes")),
    json.dumps({**TASK, "scores": None}),
    json.dumps(without(TASK, "time")),
    json.dumps(without(TASK, "seconds")),
    json.dumps({**CELL, "metrics": {}}),
    json.dumps({**CELL, "metrics": {**CELL["metrics"], "kl": "x"}}),
    json.dumps({**CELL, "metrics": {**CELL["metrics"], "kl_interval": [1]}}),
    json.dumps({**CELL, "seconds": {"evaluate": None}}),
    json.dumps({**CELL, "settings": {"version": None}}),
    json.dumps({**TASK, "scores": {"piqa": None}}),
    json.dumps({**TASK, "examples": {"piqa": {}}}),
  ],
)
def test_what_is_no_result_counts_as_missing(text, tmp_path):
  said = []
  store = results.ResultStore(tmp_path, said.append)
  write(store, CELL)
  (whole,) = tmp_path.iterdir()
  (tmp_path / "other.json").write_text(text)
  for _ in range(2):
    assert [cell["step"] for cell in store.cells()] == [2]
  assert len(said) == 1 and said[0].startswith(f"{tmp_path / 'other.json'} is not a result")
  whole.write_text(text)
  assert store.read(*(CELL[name] for name in IDENTITY)) is None and len(said) == 2


def test_an_average_of_fewer_checkpoints_than_its_name_says_is_told(tmp_path):
  cells = [
    {**CELL, "tasks": {}, "settings": {"average": name}, "averaged": steps}
    for name, steps in (("last:9", [1, 2]), ("last:9", [1, 2]), ("last:2", [1, 2]), ("ema", [2]))
  ]
  *rows, below = table.results_table(cells).splitlines()
  assert len(rows) == 5 and below == "step 2: last:9 is the mean of only 2, of steps 1, 2"


def test_scores_come_with_their_standard_error_and_their_examples(tmp_path):
  store = results.ResultStore(tmp_path)
  write(store, CELL)
  assert "examples" not in table.results_table(store.cells())
  write(store, TASK)
  (cell,) = store.cells()
  assert cell["examples"] == {"piqa": COUNTS}
  head, row, below = table.results_table([cell]).splitlines()
  assert "piqa/acc" in head and "0.5000 ± 0.2500" in row
  assert below == "examples: piqa 9 of 10 (test)"
  counts = {"split": "test", "scored": 10, "left_out": 0, "truncated": 2}
  other = {**cell, "method": "rtn", "examples": {"piqa": counts}}
  assert table.results_table([cell, other]).splitlines()[-2:] == [
    "examples of 2 none none: piqa 9 of 10 (test)",
    "examples of 2 none rtn: piqa 10 (test, 2 without their beginning)",
  ]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_disk_that_is_full_is_told_with_the_file_and_the_remedy(tmp_path, monkeypatch):
  store = results.ResultStore(tmp_path)
  full = contextlib.nullcontext(pathlib.Path("/dev/full"))
  monkeypatch.setattr(workdir.file_sums, "replaced", lambda *_: full)
  with pytest.raises(results.WriteError, match=rf"{tmp_path}/2-none-.*No space .*the same command"):
    write(store, CELL)


@pytest.mark.parametrize("what", ["moved", "removed", "another's"])
def test_results_are_not_parted_where_their_folder_is_moved(tmp_path, what):
  """Nor is a folder made where a run was moved away."""
  run, elsewhere = tmp_path / "run", tmp_path / "moved"
  store = results.ResultStore(run / "eval")
  write(store, CELL)
  run.rename(elsewhere)
  if what == "removed":
    shutil.rmtree(elsewhere)
  if what == "another's":
    (run / "eval").mkdir(parents=True)
  for again in (store.make_folder, lambda: write(store, CELL)):
    with pytest.raises(results.WriteError, match=r"run/eval was moved or removed .* same command"):
      again()
  assert run.exists() == (what == "another's") and not list(run.rglob("*.json"))
  if what == "moved":
    elsewhere.rename(run)
    write(store, {**CELL, "step": 3})
    assert [cell["step"] for cell in store.cells()] == [2, 3]


def test_a_result_that_cannot_be_read_now_is_not_to_be_removed(tmp_path, monkeypatch):
  said = []
  store = results.ResultStore(tmp_path, said.append)
  write(store, CELL)

  def fail(*arguments):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(files, "open", fail, raising=False)
  assert store.cells() == [] and len(said) == 1
  assert "Permission denied; nothing is known to be damaged" in said[0]
  assert "removed" not in said[0]


def test_a_file_that_is_gone_since_it_was_listed_is_no_result(tmp_path):
  (tmp_path / "1-none-none-01234567.json").symlink_to("nowhere")
  assert results.ResultStore(tmp_path).cells() == []


def test_an_altered_number_and_a_result_in_anothers_place_count_as_missing(tmp_path):
  said = []
  store = results.ResultStore(tmp_path, said.append)
  for documents in (0, 4):
    cell = {**CELL, "settings": {**CELL["settings"], "documents": documents}}
    write(store, cell)
  one, other = sorted(tmp_path.iterdir())
  text = one.read_text()
  one.write_text(text.replace('"loss": 3.5', '"loss": 2.5'))
  assert len(store.cells()) == 1 and said[-1].startswith(f"{one} is not a result")
  assert "was altered since it was written" in said[-1]
  one.write_text(other.read_text())
  assert len(store.cells()) == 1
  assert said[-1] == f"{one} holds the result that belongs in {other.name}, and is ignored"
  one.rename(tmp_path / "a copy.json")
  (tmp_path / "a copy.json").write_text(text)
  assert len(store.cells()) == 2, "a name that a person gave"
