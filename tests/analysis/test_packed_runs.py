"""A packed file holds what reports read of runs, and nothing of the machine that they were on."""

import json
import lzma
import pathlib
import tarfile

import pytest
from workdirs import cell, workdir

from beyond_outliers import runs
from beyond_outliers.analysis import packed_runs, ptq_degradation, tuning
from beyond_outliers.errors import ConfigError, WorkdirError
from configs import adamw, muon

PRIVATE = {"command": ["python", "/home/somebody/main.py"], "host": "a-machine"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  packed_runs._opened.cache_clear()


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
    WorkdirError, match=r"runs.tar.xz is no whole file of packed runs [^\n]*again"
  ):
    packed_runs.find_runs(path)
  assert not list((tmp_path / "cache/beyond_outliers/packed_runs").iterdir())


def test_a_name_that_leaves_its_folder_is_refused(tmp_path):
  with tarfile.open(tmp_path / "x.tar.xz", "w:xz") as archive:
    archive.addfile(tarfile.TarInfo("../outside"))
  with pytest.raises(WorkdirError, match="no whole file of packed runs"):
    packed_runs.find_runs(tmp_path / "x.tar.xz")
  assert not list(tmp_path.rglob("outside"))


def test_another_suffix_is_refused_before_reading(tmp_path):
  with pytest.raises(ConfigError, match=r"give a name that ends in \.tar\.xz"):
    packed_runs.pack_runs([], tmp_path / "runs.zip")
