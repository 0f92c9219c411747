"""Batches: the right windows, every target, the same for any number of processes, and resumed to
the bit."""

import dataclasses
import itertools
import json
import pathlib
import pickle

import numpy as np
import pytest
from corpus import make_texts, quiet

from beyond_outliers import data
from beyond_outliers.data import tfds
from beyond_outliers.data.sums import FileSums
from beyond_outliers.errors import DataError

CONTEXT, BATCH = 16, 8
KINDS = [
  "shards",
  "records",
  "in place",
]  # in place: a user's own TFDS dataset of text, tokenized while reading


@pytest.fixture
def make_dataset(make_config, tmp_path, texts):
  """(dataset, data section) of a kind; keyword arguments replace fields of the section."""

  def make(kind, **fields):
    if kind == "in place":
      fields = {
        "source": "tfds",
        "path": tfds.write_documents(iter(texts), str(tmp_path / "tfds")),
        "validation": "fraction:0.1",
        **fields,
      }
    cfg = make_config(reader="shards" if kind == "shards" else "tfds", **fields)
    return data.prepare(cfg, log=quiet), cfg

  return make


def batches_of(dataset, cfg, context=CONTEXT, batch_size=BATCH, seed=0, **process):
  return data.train_batches(
    dataset, cfg, context=context, batch_size=batch_size, seed=seed, **process
  )


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def concatenated(parts):
  """The processes' batches as global batches."""
  return [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]


# ---- what a batch is ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separator", ["eot", "bos"])
@pytest.mark.parametrize("mask", [False, True])
def test_the_batch_dict(make_dataset, kind, separator, mask):
  dataset, cfg = make_dataset(kind, separator=separator, mask_documents=mask)
  with_boundary = 0
  for batch in take(batches_of(dataset, cfg), 20):
    for name, dtype in (
      ("tokens", np.int32),
      ("targets", np.int32),
      ("segment_ids", np.int32),
      ("positions", np.int32),
      ("weights", np.float32),
    ):
      assert batch[name].shape == (BATCH, CONTEXT) and batch[name].dtype == dtype, name
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    tokens, segments = batch["tokens"], batch["segment_ids"]
    # Segments derived independently, from the separators alone.
    marks = tokens == dataset.meta["separator"]["id"]
    after = marks[:, :-1] if separator == "eot" else marks[:, 1:]
    np.testing.assert_array_equal(
      segments, 1 + np.concatenate([np.zeros((BATCH, 1), int), np.cumsum(after, 1)], 1)
    )
    with_boundary += int((segments > 1).any())
    for row in range(BATCH):
      for place in range(CONTEXT):
        first = np.flatnonzero(segments[row] == segments[row, place])[0]
        assert batch["positions"][row, place] == (place - first if mask else place)
    crosses = tokens == 257 if separator == "eot" else batch["targets"] == 256
    np.testing.assert_array_equal(batch["weights"], np.where(crosses & mask, 0, 1))
  assert with_boundary


def test_no_target_is_lost_in_an_epoch(make_dataset):
  """Every token but the first is a target once, except in the last window, which is moved back to
  fit the stream."""
  dataset, cfg = make_dataset("shards")
  stream, context = dataset.stream("train"), 64  # long enough for every window to be another
  everything, windows = stream.read(0, len(stream)), -(-(len(stream) - 1) // context)
  places = {everything[i : i + context + 1].tobytes(): i for i in range(len(stream) - context)}
  counts = np.zeros(len(stream), int)
  for batch in take(batches_of(dataset, cfg, context=context, batch_size=1), windows):
    window = np.append(batch["tokens"][0], batch["targets"][0, -1:])
    begin = places[window.astype(everything.dtype).tobytes()]
    counts[begin + 1 : begin + context + 1] += 1
  assert counts[0] == 0 and counts[1:].min() == 1 and counts.sum() == windows * context
  assert len(everything) % context != 1 and (counts[:-context] <= 1).all()


@pytest.mark.parametrize("kind", ["records", "in place"])
def test_records_are_read_whole_and_overlap_by_one(make_dataset, kind, texts):
  """One reader's windows, joined again, are its documents, and over an epoch all of them."""
  dataset, cfg = make_dataset(kind, readers=1)
  held = {
    dataset.tokenizer.decode(dataset.stream("validation").document(i))
    for i in range(dataset.documents("validation"))
  }
  expected = sorted(set(texts) - held)
  batches = batches_of(dataset, cfg, batch_size=1)
  rows = [
    batch["tokens"][0]
    for batch in take(batches, 2 + sum(len(text.encode()) + 1 for text in expected) // CONTEXT)
  ]
  read = dataset.tokenizer.decode_bytes(np.concatenate(rows)).decode("utf-8", "ignore")
  documents = np.split(np.concatenate(rows), 1 + np.flatnonzero(np.concatenate(rows) == 257))[
    : len(expected)
  ]
  assert sorted(dataset.tokenizer.decode(ids) for ids in documents) == expected and held.isdisjoint(
    read
  )


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ_in_order(make_dataset, kind):
  dataset, cfg = make_dataset(kind, readers=1)
  if kind == "shards":
    epoch = -(-(dataset.tokens("train") - 1) // CONTEXT)
    rows = [
      batch["tokens"].tobytes() for batch in take(batches_of(dataset, cfg, batch_size=1), 2 * epoch)
    ]
    assert rows[:epoch] != rows[epoch:] and sorted(rows[:epoch]) == sorted(rows[epoch:])
  else:
    stream = np.concatenate(
      [batch["tokens"][0] for batch in take(batches_of(dataset, cfg, batch_size=1), 800)]
    )
    seen = [ids.tobytes() for ids in np.split(stream, 1 + np.flatnonzero(stream == 257))[:-1]]
    epoch = len(set(seen))
    one, two = seen[:epoch], seen[epoch : 2 * epoch]
    assert len(two) == epoch and sorted(one) == sorted(two) and one != two
  other = take(batches_of(dataset, cfg, seed=1), 3)
  assert not all(
    np.array_equal(a["tokens"], b["tokens"])
    for a, b in zip(other, take(batches_of(dataset, cfg), 3), strict=True)
  )
  assert_same(take(batches_of(dataset, cfg, seed=1), 3), other)


# ---- place ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 7, 60])  # 60: into later epochs
def test_resumes_to_the_bit(make_dataset, kind, steps):
  dataset, cfg = make_dataset(kind, mask_documents=True)
  batches = batches_of(dataset, cfg)
  take(batches, steps)
  state = json.loads(json.dumps(batches.state()))  # what a checkpoint keeps
  expected = take(batches, 20)
  again = batches_of(dataset, cfg)
  take(again, 3)  # whatever it has read ahead is forgotten
  again.restore(state)
  assert again.state() == state
  assert_same(take(again, 20), expected)
  assert again.state() == batches.state()
  batches.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [1, 8])
def test_batches_read_ahead_do_not_count(make_dataset, kind, prefetch):
  dataset, cfg = make_dataset(kind, prefetch=prefetch)
  batches = batches_of(dataset, cfg)
  states = []
  for _ in range(5):
    states.append(batches.state())
    next(batches)
  again = batches_of(dataset, cfg)
  again.restore(states[3])
  next(again)
  assert again.state() == states[4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 1), (1, 4)])
def test_any_number_of_processes_gives_the_same_global_batches(make_dataset, kind, before, after):
  dataset, cfg = make_dataset(kind)
  expected = take(batches_of(dataset, cfg), 12)
  first = [batches_of(dataset, cfg, process_index=i, process_count=before) for i in range(before)]
  assert_same(concatenated([take(batches, 5) for batches in first]), expected[:5])
  merged = {}
  for batches in first:
    merged |= batches.state()
  second = [batches_of(dataset, cfg, process_index=i, process_count=after) for i in range(after)]
  for batches in second:
    batches.restore(merged)
  assert_same(concatenated([take(batches, 7) for batches in second]), expected[5:])


# ---- validation ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("documents", [0, 1, 3])
def test_validation_covers_each_target_once(make_dataset, kind, mask, documents):
  dataset, cfg = make_dataset(kind, mask_documents=mask)
  stream = dataset.stream("validation")
  count = documents or dataset.documents("validation")
  tokens = stream.read(0, int(stream.starts[count]))
  batches = data.validation_batches(
    dataset, cfg, context=CONTEXT, batch_size=BATCH, documents=documents
  )
  assert len(batches) == -(-(len(tokens) - 1) // (CONTEXT * BATCH)) == len(list(batches))
  flat = {
    name: np.concatenate([batch[name].reshape(-1) for batch in batches]) for name in batches[0]
  }
  targets = len(tokens) - 1
  np.testing.assert_array_equal(flat["tokens"][:targets], tokens[:-1])
  np.testing.assert_array_equal(flat["targets"][:targets], tokens[1:])
  assert not flat["weights"][targets:].any() and not flat["segment_ids"][targets + 1 :].any()
  owner = np.repeat(1 + np.arange(count), np.diff(stream.starts[: count + 1]))
  np.testing.assert_array_equal(flat["segment_ids"][:targets], owner[:-1])
  np.testing.assert_array_equal(
    flat["weights"][:targets], (owner[:-1] == owner[1:]) if mask else np.ones(targets)
  )
  again = [batch["tokens"] for batch in batches]  # it can be read any number of times
  assert len(again) == len(batches)


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_is_dealt_to_processes(make_dataset, processes):
  dataset, cfg = make_dataset("shards")
  whole = data.validation_batches(dataset, cfg, context=CONTEXT, batch_size=BATCH, documents=0)
  parts = [
    data.validation_batches(
      dataset,
      cfg,
      context=CONTEXT,
      batch_size=BATCH,
      documents=0,
      process_index=i,
      process_count=processes,
    )
    for i in range(processes)
  ]
  assert_same(concatenated(parts), list(whole))


# ---- scale ----


def test_sources_are_cheap_to_pickle_and_open_lazily(make_dataset):
  dataset, _ = make_dataset("shards")
  stream = dataset.stream("train")
  stream.read(0, len(stream))
  assert stream._map.cache_info().currsize > 1
  copy = pickle.loads(pickle.dumps(stream))
  assert copy._map.cache_info().currsize == 0 and len(pickle.dumps(stream)) < 2000
  np.testing.assert_array_equal(copy.read(5, 2000), stream.read(5, 2000))
  dataset, _ = make_dataset("records")
  records = tfds.Records(
    dataset.meta["records"]["path"].format(directory=dataset.directory), "tokens"
  )
  expected = records[3].content
  assert len(pickle.dumps(records)) < 1000
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(records))[3].content, expected)


def test_positions_beyond_32_bits(make_config, write_jsonl):
  """Three sparse shards of 1.5 billion tokens, the size at which 32-bit positions overflow."""
  dataset = data.prepare(
    make_config(path=write_jsonl(make_texts(3)), validation="newest:1"), log=quiet
  )
  shard = 1_500_000_000
  stream_files = [pathlib.Path(dataset.path(f"train-{i:05d}.bin")) for i in range(3)]
  for file in stream_files:
    with open(file, "wb") as sparse:
      sparse.truncate(2 * shard)
  with open(stream_files[2], "r+b") as sparse:
    sparse.seek(2 * (shard - 5))
    sparse.write(np.array([7, 8, 9, 257, 11], "<u2").tobytes())
  np.array([0, 3 * shard - 1, 3 * shard], np.int64).tofile(dataset.path("train.starts"))
  dataset.meta["splits"]["train"] |= {
    "shards": [file.name for file in stream_files],
    "tokens": 3 * shard,
  }
  unsummed = FileSums(dataset.directory, {})  # 9 GB
  dataset = dataclasses.replace(dataset, sums=unsummed)
  stream = dataset.stream("train")
  assert len(stream) == 3 * shard and stream.read(3 * shard - 5, 3 * shard).tolist() == [
    7,
    8,
    9,
    257,
    11,
  ]
  from beyond_outliers.data import windows

  tokens, documents = windows.read_windows(stream, np.array([3 * shard - 1 - CONTEXT]), CONTEXT)
  assert tokens[0, -3:].tolist() == [9, 257, 11] and documents[0, -3:].tolist() == [1, 1, 2]
  assert next(batches_of(dataset, make_config()))["tokens"].shape == (BATCH, CONTEXT)
  for file in stream_files:
    file.unlink()


# ---- refusals ----


def test_an_id_outside_the_vocabulary_is_refused_in_reading(make_dataset, make_config):
  for kind in ("shards", "records"):
    dataset, cfg = make_dataset(kind)
    with pytest.raises(
      DataError,
      match=r"data.vocab = 200: token id 257 in .*|token id \d+ is outside the vocabulary of 200",
    ):
      take(batches_of(dataset, make_config(vocab=200, reader=cfg.reader)), 50)
    with pytest.raises(DataError, match=r"data.vocab = 200: token id 257 in validation batch 0"):
      data.validation_batches(
        dataset, make_config(vocab=200), context=CONTEXT, batch_size=BATCH, documents=0
      )[0]


def test_sizes_that_do_not_divide_are_refused(make_dataset, make_config):
  dataset, cfg = make_dataset("shards")
  with pytest.raises(
    DataError, match=r"batch_size = 8: must be a multiple of the number of processes \(3\)"
  ):
    batches_of(dataset, cfg, process_index=0, process_count=3)
  with pytest.raises(DataError, match=r"context = 100000: the \d+ training tokens are too few"):
    batches_of(dataset, cfg, context=100_000)
  with pytest.raises(DataError, match=r"data.reader = 'tfds': .* holds token shards"):
    batches_of(dataset, make_config(reader="tfds"))
  with pytest.raises(DataError, match=r"eval.documents = 6: the validation split has 5"):
    data.validation_batches(dataset, cfg, context=CONTEXT, batch_size=BATCH, documents=6)
  dataset, cfg = make_dataset("records")
  with pytest.raises(DataError, match=r"data.readers = 3: must divide batch_size \(8\)"):
    batches_of(dataset, make_config(reader="tfds", readers=3))
  with pytest.raises(
    DataError, match=r"data.readers = 4: must be a multiple of the number of processes \(8\)"
  ):
    batches_of(dataset, cfg, process_count=8)
  with pytest.raises(DataError, match=r"data.readers = 64: more than the 55 training documents"):
    batches_of(dataset, make_config(reader="tfds", readers=64), batch_size=64)


def test_a_place_of_other_readers_is_refused(make_dataset, make_config):
  shards, shards_cfg = make_dataset("shards")
  records, cfg = make_dataset("records")
  of_shards, of_four = batches_of(shards, shards_cfg), batches_of(records, cfg)
  of_two = batches_of(records, make_config(reader="tfds", readers=2))
  half = batches_of(records, cfg, process_index=0, process_count=2)
  for batches, state in (
    (of_shards, of_four.state()),
    (of_four, of_shards.state()),
    (of_four, of_two.state()),
    (of_two, of_four.state()),
    (of_four, half.state()),
  ):
    with pytest.raises(DataError, match="the saved data position"):
      batches.restore(state)
