"""A packed file holds what reports read from runs, and nothing about their machine."""

import json
import lzma
import os
import pathlib
import shutil
import tarfile

import pytest
from workdirs import cell, workdir

from beyond_outliers import config, runs
from beyond_outliers.analysis import packed_runs, ptq_degradation, tuning
from beyond_outliers.errors import ConfigError, WorkdirError
from configs import adamw, muon

PRIVATE = {"command": ["python", "/home/somebody/main.py"], "host": "a-machine"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
  """Two runs, of which one has cells, with what their machine would have added."""
  root = tmp_path / "home/somebody/runs"
  for module in (adamw, muon):
    folder = workdir(root, module, 1e-2, 0, [3.0, 2.0])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["directory"] = "/home/somebody/datasets/x"
    (folder / "manifest.json").write_text(json.dumps({**manifest, **PRIVATE}))
    (folder / "checkpoints/2").mkdir(parents=True)
    (folder / "checkpoints/2/state").write_bytes(bytes(1000))
  cell(folder, 2, "rtn_w4a4", "rtn", {"loss": 4.0, "loss_difference": 0.25})
  for path in (folder / "eval").iterdir():
    found = json.loads(path.read_text())
    found["source"]["workdir"] = str(folder)
    path.write_text(json.dumps({**found, **PRIVATE}))
  return root


def test_reports_read_the_same_of_it(root, tmp_path):
  direct = runs.find(root)
  said = packed_runs.pack_runs(direct, tmp_path / "runs.tar.xz")
  assert said.startswith(f"{tmp_path}/runs.tar.xz: 2 runs, 9 files, ")
  packed = packed_runs.find_runs(tmp_path / "runs.tar.xz")
  assert [run.identity for run in packed] == [run.identity for run in direct]
  frames = [tuning.run_frame(found).drop(columns="run") for found in (direct, packed)]
  assert len(frames[0]) == 2 and frames[0].equals(frames[1])
  tables = [ptq_degradation.degradation_cells(found) for found in (direct, packed)]
  assert len(tables[0]) == 1
  tables[0]["run"] = tables[0]["run"].str.replace(str(root), f"{tmp_path}/runs.tar.xz", regex=False)
  assert tables[0].equals(tables[1])


def test_nothing_of_the_machine_is_in_it(root, tmp_path):
  packed_runs.pack_runs(runs.find(root), tmp_path / "runs.tar.xz")
  content = lzma.open(tmp_path / "runs.tar.xz").read()
  assert b"config.json" in content
  for word in (b"somebody", b"a-machine", str(tmp_path).encode(), b"checkpoints/2"):
    assert word not in content, word


@pytest.mark.parametrize("directory", [".", "text", "", "1", "bytes", "/", "done"])
def test_words_stay_that_the_folder_of_datasets_is_called_by(root, tmp_path, directory):
  """What was altered in a pack is sealed anew, and would pass as intact."""
  for run in runs.find(root):
    c = json.loads((run.path / "config.json").read_text())
    c["data"] |= {"directory": directory, "source": "text", "path": "text/*", "tokenizer": "bytes"}
    (run.path / "config.json").write_text(json.dumps(c))
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["data"]["directory"] = f"{tmp_path}/home/x"
    manifest |= {"packages": {"jax": "0.10.2"}, "resumed": [{"data": dict(manifest["data"])}]}
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    reason = f"{tmp_path}/home/x/meta.json, {run.path}/lock: no {tmp_path}/home2"
    status = {"status": "done", "step": 2, "reason": reason}
    (run.path / "status.json").write_text(json.dumps(status))
  direct = runs.find(root)
  packed_runs.pack_runs(direct, tmp_path / "runs.tar.xz")
  for was, now in zip(direct, packed_runs.find_runs(tmp_path / "runs.tar.xz"), strict=True):
    assert now.manifest["packages"] == {"jax": "0.10.2"} and now.identity == was.identity
    assert set(config.differences(was.config, now.config)) <= {"data.directory"}
    assert (now.config.data.directory, now.trained_on["directory"]) == ("datasets", "datasets/x")
    assert now.manifest["resumed"] == [{"data": now.trained_on}]
    name = was.path.name
    assert now.status["reason"] == f"datasets/x/meta.json, {name}/lock: no {tmp_path}/home2"


@pytest.mark.parametrize(
  "key, value, told",
  [
    ("seed", 3, "muon/none-0.01-0 would have another seed"),
    ("seed", -3, "could not be read back .*seed = -3"),
    ("identity", "other", "muon/none-0.01-0 would have another identity"),
    ("time", None, "muon/none-0.01-0 would not be a run"),
  ],
)
def test_runs_that_would_be_others_do_not_replace_a_former_file(
  root, tmp_path, monkeypatch, key, value, told
):
  packed_runs.pack_runs(runs.find(root), tmp_path / "runs.tar.xz")
  content, contents = (tmp_path / "runs.tar.xz").read_bytes(), packed_runs._contents

  def damaged(run, folder):
    for name, text in contents(run, folder):
      found = json.loads(text) if name in ("config.json", "manifest.json") else {}
      if folder.parent.name == "muon" and key in found:
        if value is None:
          continue
        text = packed_runs._text({**found, key: value}, {})
      yield name, text

  monkeypatch.setattr(packed_runs, "_contents", damaged)
  # The configuration's sum is in the manifest.
  monkeypatch.setattr(packed_runs, "digest", lambda found: "")
  with pytest.raises(WorkdirError, match=f"runs.tar.xz: .*{told}.*nothing was written"):
    packed_runs.pack_runs(runs.find(root), tmp_path / "runs.tar.xz")
  assert (tmp_path / "runs.tar.xz").read_bytes() == content
  assert set(os.listdir(tmp_path)) == {"home", "runs.tar.xz"}


@pytest.mark.parametrize(
  "lost", ["muon", "muon/none-0.01-0/metrics.jsonl", "altered", "sha256.json"]
)
def test_what_is_gone_from_the_cache_is_opened_anew(root, tmp_path, lost):
  packed_runs.pack_runs(runs.find(root), tmp_path / "runs.tar.xz")
  first = packed_runs.find_runs(tmp_path / "runs.tar.xz")
  (opened,) = (tmp_path / "cache/beyond_outliers/packed_runs").iterdir()
  if lost == "altered":
    (opened / "muon/none-0.01-0/status.json").write_text("{}")
  elif (opened / lost).is_dir():
    shutil.rmtree(opened / lost)
  else:
    (opened / lost).unlink()
  again = packed_runs.find_runs(tmp_path / "runs.tar.xz")
  assert [run.name for run in again] == [run.name for run in first] and len(first) == 2
  assert all(run.metrics().equals(was.metrics()) for run, was in zip(again, first, strict=True))
  assert again[1].status["status"] == "done"
  assert list((tmp_path / "cache/beyond_outliers/packed_runs").iterdir()) == [opened]


def test_a_run_in_the_folder_of_another(root, tmp_path):
  inner, outer = (run.path for run in runs.find(root))
  shutil.move(inner, outer / "inner")
  said = packed_runs.pack_runs(runs.find(root), tmp_path / "runs.tar.xz")
  assert ": 2 runs, " in said
  found = packed_runs.find_runs(tmp_path / "runs.tar.xz")
  assert [run.name for run in found] == [
    f"{tmp_path}/runs.tar.xz/{name}" for name in ("none-0.01-0", "none-0.01-0/inner")
  ]


def test_the_same_runs_give_the_same_bytes(root, tmp_path):
  for name in ("a.tar.xz", "b.tar.xz"):
    packed_runs.pack_runs(runs.find(root)[:: 1 if name < "b" else -1], tmp_path / name)
  assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()


def test_packing_what_was_packed_changes_nothing(root, tmp_path):
  packed_runs.pack_runs(runs.find(root), tmp_path / "a.tar.xz")
  packed_runs.pack_runs(packed_runs.find_runs(tmp_path / "a.tar.xz"), tmp_path / "b.tar.xz")
  with tarfile.open(tmp_path / "a.tar.xz") as a, tarfile.open(tmp_path / "b.tar.xz") as b:
    assert a.getnames() == b.getnames()
    for name in a.getnames():
      assert a.extractfile(name).read() == b.extractfile(name).read(), name


def test_a_folder_of_it_is_a_root_too(root, tmp_path):
  packed_runs.pack_runs(runs.find(root), tmp_path / "runs.tar.xz")
  (found,) = packed_runs.find_runs(tmp_path / "runs.tar.xz/muon")
  assert found.config.optimizer.name == "muon"
  assert found.name.startswith(f"{tmp_path}/runs.tar.xz/muon/")
  assert pathlib.Path(found.path).is_relative_to(tmp_path / "cache")


def test_a_single_run(root, tmp_path):
  packed_runs.pack_runs(runs.find(root / "muon"), tmp_path / "run.tar.xz")
  assert len(packed_runs.find_runs(tmp_path / "run.tar.xz")) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "no archive"])
def test_a_damaged_file_is_refused(root, tmp_path, damage):
  path = tmp_path / "runs.tar.xz"
  packed_runs.pack_runs(runs.find(root), path)
  content = path.read_bytes()
  middle = len(content) // 2
  path.write_bytes(
    {
      "cut": content[:middle],
      "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
      "no archive": b"text",
    }[damage]
  )
  with pytest.raises(
    WorkdirError, match=r"runs.tar.xz is not a complete file of packed runs [^\n]*again"
  ):
    packed_runs.find_runs(path)
  assert not list((tmp_path / "cache/beyond_outliers/packed_runs").iterdir())


def test_a_name_that_leaves_its_folder_is_refused(tmp_path):
  with tarfile.open(tmp_path / "x.tar.xz", "w:xz") as archive:
    archive.addfile(tarfile.TarInfo("../outside"))
  with pytest.raises(WorkdirError, match="not a complete file of packed runs"):
    packed_runs.find_runs(tmp_path / "x.tar.xz")
  assert not list(tmp_path.rglob("outside"))


def test_another_suffix_is_refused_before_reading(tmp_path):
  with pytest.raises(ConfigError, match=r"give a name that ends in \.tar\.xz"):
    packed_runs.pack_runs([], tmp_path / "runs.zip")
