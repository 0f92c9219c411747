"""Sums of a prepared dataset: files altered on the disk are refused, whatever reads them."""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
import threading

import pytest
from corpus import quiet

from beyond_outliers import data
from beyond_outliers.data import sums, token_stream
from beyond_outliers.errors import DataError

NAMED = r"{}: contents are not those that were prepared \(SHA-256 differs from meta.json's\)"


@pytest.fixture
def large(monkeypatch):
  """Every file is as one that is too large to be read as a dataset is opened."""
  monkeypatch.setattr(sums, "AT_OPENING", 0)


def flip(path, at=None):
  content = bytearray(pathlib.Path(path).read_bytes())
  content[len(content) // 2 if at is None else at] ^= 1
  pathlib.Path(path).write_bytes(content)


def replace(path):
  """Another file of the same contents."""
  copy = path.with_name("copy")
  copy.write_bytes(path.read_bytes())
  copy.rename(path)


def train(dataset, cfg):
  return data.train_batches(dataset, cfg, context=16, batch_size=4, seed=0)


def validation(dataset, cfg, documents=0):
  return data.validation_batches(dataset, cfg, context=16, batch_size=2, documents=documents)


def prepared(cfg):
  return pathlib.Path(data.prepare(cfg, log=quiet).directory)


@pytest.mark.parametrize("name", ["train-00000.bin", "train.starts", "validation-00000.bin"])
def test_a_small_file_is_compared_as_its_dataset_is_opened(make_config, name):
  folder = prepared(make_config())
  flip(folder / name)
  with pytest.raises(DataError, match=NAMED.format(name)):
    data.open(str(folder))
  with pytest.raises(DataError, match=NAMED.format(name)):
    data.prepare(make_config(), log=quiet)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
  "reader, pattern",
  [("shards", "train-00001.bin"), ("shards", "train.starts"), ("tfds", "records/**/*record-*")],
)
def test_an_altered_training_file_ends_training(make_config, reader, pattern):
  cfg = make_config(reader=reader)
  folder = prepared(cfg)
  path = next(folder.glob(pattern))
  flip(path, -1 if reader == "tfds" else None)  # padding, which ArrayRecord's own sums leave out
  dataset = data.open(str(folder))
  batches = train(dataset, cfg)
  with pytest.raises(DataError, match=NAMED.format(path.name)):
    for _ in range(10_000):
      next(batches)
  for raises in (dataset.sums.wait, dataset.sums.check, lambda: next(batches)):
    with pytest.raises(DataError, match=NAMED.format(path.name)):
      raises()
  batches.close()


@pytest.mark.usefixtures("large")
def test_a_batch_does_not_wait_for_the_sum_of_its_file(make_config, monkeypatch):
  cfg = make_config()
  folder, finish = prepared(cfg), threading.Event()
  flip(folder / "train-00000.bin")
  compare = sums.file_sha256
  monkeypatch.setattr(sums, "file_sha256", lambda path: finish.wait(60) and compare(path))
  dataset = data.open(str(folder))
  batches = train(dataset, cfg)
  for _ in range(20):
    next(batches)
  finish.set()
  with pytest.raises(DataError, match=NAMED.format("train-00000.bin")):
    dataset.sums.wait()
  batches.close()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("documents", [0, 1])
@pytest.mark.parametrize("name", ["validation-00000.bin", "validation.starts", "validation.bytes"])
def test_nobody_gets_all_batches_of_an_altered_validation_split(make_config, name, documents):
  cfg = make_config()
  folder = prepared(cfg)
  flip(folder / name, 0 if name == "validation-00000.bin" else -16)  # -16: the last document's
  with pytest.raises(DataError, match=NAMED.format(name)):
    list(validation(data.open(str(folder)), cfg, documents))


@pytest.mark.usefixtures("large")
def test_files_that_vanish_or_are_cut_while_they_are_read_are_refused(make_config):
  cfg = make_config()
  folder = prepared(cfg)
  dataset = data.open(str(folder))
  (folder / "train-00001.bin").unlink()
  with pytest.raises(DataError, match=r"train-00001.bin: No such file.*; delete the folder and"):
    dataset.stream("train")
  stream = dataset.stream("validation")
  (folder / "validation.starts").unlink()
  with pytest.raises(DataError, match=r"validation.starts: No such file.*; delete the folder and"):
    stream.document(0)
  path = folder / "validation-00000.bin"
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(DataError, match=NAMED.format(path.name)):
    stream.verify()


@pytest.mark.parametrize("name", ["train-00000.bin", "train.starts"])
@pytest.mark.parametrize("change", [flip, lambda path: os.truncate(path, 100)])
def test_a_file_that_is_written_to_while_it_trains_ends_training(make_config, name, change):
  """After a file is cut, the last page of its memory map has zeros beyond the end."""
  cfg = make_config()
  folder = prepared(cfg)
  dataset = data.open(str(folder))
  batches = train(dataset, cfg)
  next(batches)
  dataset.sums.wait()
  change(folder / name)
  with pytest.raises(DataError, match=NAMED.format(name)):
    dataset.sums.wait()  # as every checkpoint does
  batches.close()


def test_a_validation_file_that_is_written_to_is_told_with_its_batches(make_config):
  cfg = make_config()
  folder = prepared(cfg)
  batches = validation(data.open(str(folder)), cfg)
  list(batches)
  os.truncate(folder / "validation-00000.bin", 10)
  with pytest.raises(DataError, match=NAMED.format("validation-00000.bin")):
    list(batches)


def test_an_open_file_may_vanish_be_replaced_or_written_anew_with_the_same(make_config):
  cfg = make_config()
  folder = prepared(cfg)
  dataset = data.open(str(folder))
  batches = train(dataset, cfg)
  next(batches)
  (folder / "train.bytes").unlink()
  replace(folder / "train.starts")
  path = folder / "train-00000.bin"
  path.write_bytes(path.read_bytes())
  dataset.sums.wait()
  next(batches)
  batches.close()


@pytest.mark.usefixtures("large")
def test_a_stream_in_another_process_compares_what_was_not_compared_yet(make_config):
  folder = prepared(make_config())
  flip(folder / "validation-00000.bin")
  dataset = data.open(str(folder))
  dataset.sums.verify(["train-00000.bin"])
  copy = pickle.loads(pickle.dumps(dataset.stream("validation")))
  with pytest.raises(DataError, match=NAMED.format("validation-00000.bin")):
    copy.verify()


def test_a_file_in_the_place_of_another_is_compared_before_it_is_read(make_config, monkeypatch):
  """Shards that were closed, since there are many, are opened again by name."""
  monkeypatch.setattr(token_stream, "OPEN_SHARDS", 1)
  folder = prepared(make_config())
  stream = pickle.loads(pickle.dumps(data.open(str(folder)).stream("train")))

  def read():
    ends = stream.read(0, 10), stream.read(len(stream) - 10, len(stream))
    return [end.tolist() for end in ends]

  before = read()
  replace(folder / "train-00000.bin")
  assert read() == before, "a copy"
  flip(folder / "train-00000.bin")
  with pytest.raises(DataError, match=NAMED.format("train-00000.bin")):
    read()


@pytest.mark.usefixtures("large")
def test_a_file_that_is_replaced_before_it_was_compared_is_told(make_config, monkeypatch):
  folder, finish = prepared(make_config()), threading.Event()
  compare = sums.file_sha256
  monkeypatch.setattr(sums, "file_sha256", lambda path: finish.wait(60) and compare(path))
  dataset = data.open(str(folder))
  dataset.stream("train").read(0, 10)
  replace(folder / "train-00000.bin")
  finish.set()
  with pytest.raises(DataError, match=r"train-00000.bin: was replaced while it was read; nothing"):
    dataset.sums.wait()


def test_a_link_to_the_dataset_may_lead_elsewhere_once_it_is_open(make_config, tmp_path):
  one, other = (prepared(make_config(directory=str(tmp_path / name))) for name in "ab")
  flip(other / "train-00000.bin", 0)
  (tmp_path / "link").symlink_to(one)
  dataset = data.open(str(tmp_path / "link"))
  (tmp_path / "link").unlink()
  (tmp_path / "link").symlink_to(other)
  assert dataset.directory == str(tmp_path / "link")
  expected = data.open(str(one)).stream("train")
  assert dataset.stream("train").read(0, 99).tolist() == expected.read(0, 99).tolist()


# ---- the description


@pytest.mark.parametrize(
  "key, value",
  [
    ("splits.validation.bytes", 1),
    ("splits.train.documents", 1),
    ("separator.id", 3),
    ("tokenizer.eot", "x"),
    ("first_bytes", {"0": 7}),
    ("inputs.bytes", 5),
  ],
)
def test_an_altered_number_of_the_description_is_refused(make_config, key, value):
  folder = prepared(make_config())
  meta = json.loads((folder / "meta.json").read_text())
  *above, last = key.split(".")
  node = meta
  for name in above:
    node = node[name]
  node[last] = value
  (folder / "meta.json").write_text(json.dumps(meta))
  with pytest.raises(DataError, match=r"/meta.json: was altered since .*; delete the folder and"):
    data.open(str(folder))


def test_a_description_of_another_dataset_is_refused(make_config, tmp_path):
  cfg = make_config()
  others = [
    dataclasses.replace(cfg, directory=str(tmp_path / "others"), **changed)
    for changed in ({"seed": 1}, {"shard_tokens": 2000}, {"validation": "newest:4"})
  ]
  folder = prepared(cfg)
  for other in others:
    (folder / "meta.json").write_bytes((prepared(other) / "meta.json").read_bytes())
    with pytest.raises(DataError, match=r"delete the folder and prepare again"):
      data.prepare(cfg, log=quiet)


def test_a_description_from_before_it_had_a_sum_is_read(make_config):
  cfg = make_config()
  folder = prepared(cfg)
  meta = json.loads((folder / "meta.json").read_text())
  del meta["sha256"]
  (folder / "meta.json").write_text(json.dumps(meta))
  assert data.prepare(cfg, log=quiet).meta == data.open(str(folder)).meta == meta


@pytest.mark.parametrize(
  "change, problem",
  [
    ({"files": {"../secret": {"bytes": 3, "sha256": ""}}}, "names '../secret', outside"),
    ({"files": {"/etc/hostname": {"bytes": 3, "sha256": ""}}}, "names '/etc/hostname', outside"),
    ({"tokenizer": {"stored": "huggingface:/etc/x.json"}}, "tokenizer.stored is 'huggingface:/etc"),
    (
      {"tokenizer": {"stored": "gpt2:{directory}/../x"}},
      "tokenizer.stored is 'gpt2:{directory}/..",
    ),
    ({"records": {"path": "{directory}/../x"}}, "records.path is '{directory}/../x'"),
    ({"records": {"path": "elsewhere"}}, "records.path is 'elsewhere'"),
  ],
)
def test_a_description_that_leaves_its_folder_is_refused(make_config, change, problem):
  folder = prepared(make_config())
  meta = json.loads((folder / "meta.json").read_text())
  del meta["sha256"]  # as whoever writes such a description would
  blank = {"field": "tokens", "count": 1, "held_out": 0.0}
  for key, value in change.items():
    meta[key] = {**(meta[key] or blank), **value}
  (folder / "meta.json").write_text(json.dumps(meta))
  with pytest.raises(DataError) as refused:
    data.open(str(folder))
  assert problem in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(make_config, monkeypatch):
  folder = prepared(make_config())

  def fail(path):
    raise OSError(errno.EMFILE, "Too many open files")

  monkeypatch.setattr(sums, "file_sha256", fail)
  with pytest.raises(DataError, match=r"Too many open files; nothing .* damaged: give the same"):
    data.open(str(folder))


@pytest.mark.usefixtures("large")
def test_a_folder_that_is_gone_or_not_mounted_is_not_called_damaged(make_config):
  """Whoever reads it then, in whatever way, is told to bring it back, not to prepare it again."""
  folder = prepared(make_config())
  dataset = data.open(str(folder))
  stream = dataset.stream("validation")
  folder.rename(folder.with_name("elsewhere"))
  folder.mkdir()  # where it was mounted
  reads = (lambda: dataset.stream("train"), lambda: stream.document(0), lambda: stream.verify())
  for read in reads:
    with pytest.raises(DataError, match=r"No such file .*; all of .* is gone or not mounted: give"):
      read()


def test_a_thread_is_seen_once_it_can_be_joined(make_config, large, monkeypatch):
  """`wait` may be called at any moment: here, just before the thread starts."""
  dataset = data.open(str(prepared(make_config())))
  start = threading.Thread.start

  def start_watched(thread):
    dataset.sums.wait()
    start(thread)

  monkeypatch.setattr(threading.Thread, "start", start_watched)
  dataset.sums.touch("train-00000.bin")
  dataset.sums.wait()
