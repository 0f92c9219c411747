"""A prepared dataset holds every document once, is made once, and is refused when anything about it
does not fit."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import make_texts, prepare_in_child, quiet

from beyond_outliers import config, data, prepare
from beyond_outliers.data import (
  encoding,
  preparation,
  shuffle,
  splits,
  tfds,
  tokenizer_training,
  tokenizers,
)
from beyond_outliers.errors import DataError
from configs import adamw

ROOT = pathlib.Path(data.__file__).parents[2]


def documents_of(dataset, split):
  stream = dataset.stream(split)
  return [stream.document(i) for i in range(dataset.documents(split))]


def decoded(dataset, split):
  """The texts, each checked to be followed, or preceded, by its separator."""
  separator = dataset.meta["separator"]
  found = []
  for ids in documents_of(dataset, split):
    mark, rest = (ids[-1], ids[:-1]) if separator["name"] == "eot" else (ids[0], ids[1:])
    assert mark == separator["id"]
    found.append(dataset.tokenizer.decode(rest))
  return found


@pytest.mark.parametrize("separator", ["eot", "bos"])
@pytest.mark.parametrize("tokenizer, vocab", [("bytes", 258), ("sentencepiece", 320)])
def test_documents_survive(make_config, texts, separator, tokenizer, vocab):
  dataset = data.prepare(
    make_config(separator=separator, tokenizer=tokenizer, vocab=vocab), log=quiet
  )
  assert decoded(dataset, "validation") == texts[-5:]  # in the source's order
  assert sorted(decoded(dataset, "train")) == sorted(texts[:-5])  # shuffled
  assert decoded(dataset, "train") != texts[:-5]
  for split, expected in (("train", texts[:-5]), ("validation", texts[-5:])):
    assert dataset.documents(split) == len(expected)
    assert dataset.bytes(split) == sum(len(text.encode()) for text in expected)
    assert dataset.tokens(split) == sum(
      1 + len(dataset.tokenizer.encode(text)) for text in expected
    )
  assert dataset.bytes("validation", documents=2) == sum(
    len(text.encode()) for text in texts[-5:-3]
  )


def test_meta_says_what_was_done(make_config):
  cfg = make_config()
  meta = data.prepare(cfg, log=quiet).meta
  assert meta["settings"]["validation"] == "newest:5" and meta["separator"] == {
    "name": "eot",
    "id": 257,
  }
  assert meta["tokenizer"]["fingerprint"] == tokenizers.load("bytes").fingerprint
  assert (
    len(meta["splits"]["train"]["shards"])
    == -(-meta["splits"]["train"]["tokens"] // cfg.shard_tokens)
    > 1
  )
  assert all(len(entry["sha256"]) == 64 for entry in meta["files"].values())


def test_a_path_that_the_source_does_not_read_is_refused(make_config):
  cfg = make_config(source="sotu", path="texts/*.txt")
  with pytest.raises(DataError, match=r"data.path = 'texts/\*.txt': source 'sotu' has its own"):
    data.prepare(cfg, log=quiet)


def test_same_settings_same_bytes_and_another_seed_another_order(make_config, tmp_path):
  one, two = (data.prepare(make_config(directory=str(tmp_path / name)), log=quiet) for name in "ab")
  assert one.fingerprint == two.fingerprint and one.meta["files"] == two.meta["files"]
  other = data.prepare(make_config(seed=1), log=quiet)
  assert other.fingerprint != one.fingerprint
  assert decoded(other, "train") != decoded(one, "train") and sorted(
    decoded(other, "train")
  ) == sorted(decoded(one, "train"))


def test_names_and_contents_are_those_of_version_0_1(make_config, monkeypatch, tmp_path):
  """A dataset that was prepared once is found again, and one prepared anew has the same bytes."""
  assert data.dataset_directory(config.resolve(adamw.get_config()).data) == (
    "datasets/sotu-sentencepiece2048-883d9292e4"
  )
  assert data.prepare(make_config(), log=quiet).fingerprint.startswith("a42aeb9c3ec1")
  monkeypatch.setattr(encoding, "ENCODE_AT_ONCE", 100)
  again = data.prepare(make_config(directory=str(tmp_path / "again")), log=quiet)
  assert again.fingerprint.startswith("a42aeb9c3ec1")


def test_the_shuffle_of_many_buckets_keeps_every_document(make_config, texts, monkeypatch):
  monkeypatch.setattr(shuffle, "BUCKET_BYTES", 1000)
  dataset = data.prepare(make_config(), log=quiet)
  assert dataset.fingerprint.startswith("f85bea33b20e")
  assert sorted(decoded(dataset, "train")) == sorted(texts[:-5])
  assert not os.path.exists(dataset.path("shuffle"))


def test_shards_are_one_stream(make_config, tmp_path):
  small, large = (
    data.prepare(make_config(shard_tokens=n), log=quiet).stream("train") for n in (7, 10**9)
  )
  everything = large.read(0, len(large))
  assert len(small) == len(large) and len(small._shards) > 256 > len(large._shards)
  np.testing.assert_array_equal(small.read(0, len(small)), everything)
  for start, stop in (
    (0, 1),
    (6, 8),
    (7, 14),
    (5, 40),
    (len(large) - 3, len(large) + 9),
    (len(large), len(large) + 1),
  ):
    np.testing.assert_array_equal(small.read(start, stop), everything[start:stop])


def test_a_large_vocabulary_takes_four_bytes(make_config, write_jsonl, monkeypatch):
  monkeypatch.setattr(tokenizers.Bytes, "vocab_size", 70_000)
  cfg = make_config(path=write_jsonl([[69_999, 1], [2]]), vocab=70_000, validation="newest:1")
  dataset = data.prepare(cfg, log=quiet)
  assert dataset.meta["dtype"] == "<u4" and documents_of(dataset, "train")[0].tolist() == [
    69_999,
    1,
    257,
  ]


# ---- token ids ----


def test_token_ids_are_taken_as_they_are(make_config, write_jsonl, texts):
  """Texts and their ids make the same dataset, bytes of text included; an end-of-text token that is
  present is not added again."""
  tokenizer = tokenizers.load("bytes")
  ids = [tokenizer.encode(text).tolist() + [257] * (i % 2) for i, text in enumerate(texts)]
  from_ids = data.prepare(make_config(path=write_jsonl(ids, "ids.jsonl")), log=quiet)
  from_text = data.prepare(make_config(), log=quiet)
  assert decoded(from_ids, "train") == decoded(from_text, "train")
  assert from_ids.meta["splits"] == from_text.meta["splits"]


def test_climbmix_rows_with_gpt2_ids(tmp_path, make_config):
  pytest.importorskip("tiktoken", reason="needs the extra 'hf'")
  try:
    gpt2 = tokenizers.load("gpt2:" + os.environ.get("GPT2_DIR", ""))
  except DataError as error:
    pytest.skip(str(error))
  gpt2.save(str(tmp_path))
  texts = make_texts(20)
  rows = [gpt2.encode(text) for text in texts]
  table = {
    "cluster_id": [1] * 20,
    "tokens": pa.array(rows, pa.list_(pa.int32())),
    "token_count": list(map(len, rows)),
  }
  pq.write_table(pa.table(table), str(tmp_path / "climbmix.parquet"))
  dataset = data.prepare(
    make_config(
      source="parquet",
      path=str(tmp_path / "climbmix.parquet"),
      field="tokens",
      tokenizer=f"gpt2:{tmp_path}",
      vocab=50304,
    ),
    log=quiet,
  )
  assert decoded(dataset, "validation") == texts[-5:]
  assert dataset.bytes("train") == sum(len(text.encode()) for text in texts[:-5])


@pytest.mark.parametrize("reader", ["shards", "tfds"])
@pytest.mark.parametrize("ids, wrong", [([5, 258], 258), ([5, -1], -1)])
def test_an_id_outside_the_vocabulary_is_refused_by_document(
  make_config, write_jsonl, reader, ids, wrong
):
  cfg = make_config(path=write_jsonl([[1], ids, [2], [3]]), validation="newest:1", reader=reader)
  with pytest.raises(
    DataError, match=rf"corpus.jsonl:2: token id {wrong} is outside the vocabulary of 258"
  ):
    data.prepare(cfg, log=quiet)


class Panic(BaseException):
  """What a Rust library raises, which is not an Exception."""


@pytest.mark.parametrize("raised", [Panic, ValueError])
@pytest.mark.parametrize("read_in_place", [False, True])
def test_a_document_that_the_tokenizer_fails_on_is_named(
  tmp_path, make_config, texts, monkeypatch, raised, read_in_place
):
  encode = tokenizers.Bytes.encode_batch

  def encode_batch(self, batch):
    if any("document 7:" in text for text in batch):
      raise raised("called `Result::unwrap()`\non an `Err` value")
    return encode(self, batch)

  monkeypatch.setattr(tokenizers.Bytes, "encode_batch", encode_batch)
  fields, place = {}, "corpus.jsonl:8"
  if read_in_place:
    fields = {
      "source": "tfds",
      "reader": "tfds",
      "path": tfds.write_documents(texts, str(tmp_path)),
    }
    place = "record 7"
  cfg = make_config(**fields)
  with pytest.raises(
    DataError, match=rf"{place}: the tokenizer fails on this .* characters"
  ) as said:
    dataset = data.prepare(cfg, log=quiet)
    batches = data.train_batches(dataset, cfg, context=64, batch_size=4, seed=0)
    for _ in range(40):
      next(batches)
  assert "\n" not in str(said.value)


def test_token_ids_train_no_tokenizer(make_config, write_jsonl):
  with pytest.raises(
    DataError, match=r"corpus.jsonl:1: holds token ids, on which no SentencePiece model"
  ):
    data.prepare(
      make_config(
        path=write_jsonl([[1], [2], [3]]),
        tokenizer="sentencepiece",
        vocab=300,
        validation="newest:1",
      ),
      log=quiet,
    )


@pytest.mark.parametrize("reader", ["shards", "tfds"])
@pytest.mark.parametrize("validation", ["newest:5", "fraction:0.3"])
def test_the_tokenizer_sees_training_documents_only(
  tmp_path, make_config, texts, monkeypatch, reader, validation
):
  seen = []
  train = tokenizer_training.train_sentencepiece
  monkeypatch.setattr(
    tokenizer_training,
    "train_sentencepiece",
    lambda texts, vocab: seen.extend(texts) or train(texts, vocab),
  )
  path = tfds.write_documents(iter(texts), str(tmp_path))
  dataset = data.prepare(
    make_config(
      source="tfds",
      path=path,
      reader=reader,
      validation=validation,
      tokenizer="sentencepiece",
      vocab=320,
    ),
    log=quiet,
  )
  held = decoded(dataset, "validation")
  assert seen == [text for text in texts if text not in held] and len(seen) + len(held) == len(
    texts
  )


# ---- once, and whole ----


def test_what_is_there_is_opened(make_config, monkeypatch):
  cfg = make_config()
  made = data.prepare(cfg, log=quiet)
  monkeypatch.setattr(preparation, "_fill", None)
  assert (
    data.prepare(cfg, log=quiet).fingerprint
    == made.fingerprint
    == data.open(made.directory).fingerprint
  )


def test_a_failure_leaves_nothing(make_config, write_jsonl):
  cfg = make_config(path=write_jsonl(["fine", "fine", 5]))
  for _ in range(2):
    with pytest.raises(DataError):
      data.prepare(cfg, log=quiet)
    assert [name for name in os.listdir(cfg.directory) if not name.endswith(".lock")] == []


def test_a_killed_preparation_is_not_taken_for_data(make_config):
  cfg, context = make_config(), multiprocessing.get_context("spawn")
  queue = context.Queue()
  child = context.Process(target=prepare_in_child, args=(cfg, True, queue))
  child.start()
  child.join()
  assert child.exitcode == 9 and any(".partial-" in name for name in os.listdir(cfg.directory))
  dataset = data.prepare(cfg, log=quiet)
  assert dataset.documents("train") == 55
  assert not any(".partial-" in name for name in os.listdir(cfg.directory))


def test_processes_that_race_prepare_once(make_config):
  cfg, context = make_config(), multiprocessing.get_context("spawn")
  queue = context.Queue()
  children = [context.Process(target=prepare_in_child, args=(cfg, False, queue)) for _ in range(3)]
  os.makedirs(cfg.directory)
  with preparation._lock(data.dataset_directory(cfg), quiet):  # all of them find it held
    for child in children:
      child.start()
    waiting = [queue.get(timeout=60) for _ in children]
  assert all("another process prepares" in message for message in waiting)
  for child in children:
    child.join()
  messages = [queue.get(timeout=60) for _ in range(4)]
  fingerprints = {message[0] for message in messages if isinstance(message, tuple)}
  assert (
    len(fingerprints) == 1 and sum(isinstance(message, str) for message in messages) == 1
  )  # one says it prepares


# ---- refusals ----


def test_missing_short_and_damaged_files_are_refused(make_config):
  cfg = make_config()
  dataset = data.prepare(cfg, log=quiet)
  data.verify(dataset)
  path = pathlib.Path(dataset.path("train-00001.bin"))
  whole = path.read_bytes()
  path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
  for open_it in (data.verify, lambda dataset: data.open(dataset.directory)):
    with pytest.raises(
      DataError, match=r"train-00001.bin: contents are not those that were prepared"
    ):
      open_it(dataset)
  path.write_bytes(whole[:-2])
  with pytest.raises(
    DataError, match=rf"train-00001.bin has {len(whole) - 2} bytes, meta.json says {len(whole)}"
  ):
    data.prepare(cfg, log=quiet)
  path.unlink()
  with pytest.raises(DataError, match=r"train-00001.bin: No such file .*; delete the folder and"):
    data.prepare(cfg, log=quiet)
  path.write_bytes(whole)
  data.verify(data.prepare(cfg, log=quiet))
  os.remove(dataset.path("meta.json"))
  with pytest.raises(DataError, match=r"not a prepared dataset \(no meta.json\)"):
    data.prepare(cfg, log=quiet)


def test_another_format_is_refused(make_config):
  dataset = data.prepare(make_config(), log=quiet)
  with open(dataset.path("meta.json"), "w") as file:
    json.dump({**dataset.meta, "format": 0}, file)
  with pytest.raises(DataError, match="format 0, this version reads 1"):
    data.open(dataset.directory)


@pytest.mark.parametrize(
  "kept", ["", '{"format": 1,', '["format"]', '{"format": 1}', "{}", "\ufffd"]
)
def test_a_damaged_description_is_refused_by_name(make_config, kept):
  dataset = data.prepare(make_config(), log=quiet)
  with open(dataset.path("meta.json"), "w") as file:
    file.write(kept)
  with pytest.raises(DataError, match=r"meta.json: .*; delete the folder and prepare again"):
    data.open(dataset.directory)


@pytest.mark.parametrize(
  "key, value, problem",
  [
    ("dtype", "x", "dtype is 'x'"),
    ("files", None, "files is None"),
    ("files", {}, "files lacks train-00000.bin of the train split"),
    ("files.train-00000|bin", {}, "entry train-00000.bin: lacks bytes, sha256"),
    ("tokenizer.fingerprint", 1, "tokenizer.fingerprint is 1"),
    (
      "splits.train.tokens",
      3,
      "the train split counts 3 tokens, which is not what its shards hold",
    ),
    ("splits.validation.shards", [], "the validation split counts .* tokens, which is not"),
    ("splits.validation.shards", [[]], "files lacks"),
    ("records", {}, "entry records: lacks path"),
    ("first_bytes", [], "first_bytes is not"),
  ],
)
def test_a_description_with_other_values_is_refused(make_config, key, value, problem):
  dataset = data.prepare(make_config(), log=quiet)
  meta = json.loads(pathlib.Path(dataset.path("meta.json")).read_text())
  del meta["sha256"]  # as it was before descriptions held their own sum, or where it was left out
  *above, last = (name.replace("|", ".") for name in key.split("."))
  node = meta
  for name in above:
    node = node[name]
  node[last] = value
  pathlib.Path(dataset.path("meta.json")).write_text(json.dumps(meta))
  with pytest.raises(DataError, match=f"/meta.json: .*{problem}.*; delete the folder and prepare"):
    data.open(dataset.directory)


def test_a_mismatched_tokenizer_is_refused(tmp_path, make_config, texts):
  file = tmp_path / "x.model"
  file.write_bytes(tokenizer_training.train_sentencepiece(texts, 320))
  cfg = make_config(tokenizer=f"sentencepiece:{file}", vocab=400)
  dataset = data.prepare(cfg, log=quiet)
  other = tokenizer_training.train_sentencepiece(texts[::2], 320)
  file.write_bytes(other)
  with pytest.raises(
    DataError, match=rf"data.tokenizer = 'sentencepiece:{file}': now has fingerprint"
  ):
    data.prepare(cfg, log=quiet)
  copy = pathlib.Path(dataset.path("tokenizer.model"))
  copy.write_bytes(
    other + bytes(copy.stat().st_size - len(other)) if len(other) < copy.stat().st_size else other
  )
  dataset.meta["files"]["tokenizer.model"] = {
    "bytes": copy.stat().st_size,
    "sha256": hashlib.sha256(copy.read_bytes()).hexdigest(),
  }
  with open(dataset.path("meta.json"), "w") as stream:
    json.dump(dataset.meta, stream)
  with pytest.raises(
    DataError, match=r"its tokenizer has fingerprint|is not a SentencePiece model"
  ):
    data.open(dataset.directory)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_config):
  for cfg in (make_config(vocab=257), make_config(vocab=257, source="sotu", path="")):
    with pytest.raises(DataError, match=r"data.vocab = 257: the tokenizer 'bytes' has 258 tokens"):
      data.prepare(cfg, log=quiet)
  data.prepare(make_config(), log=quiet)
  with pytest.raises(DataError, match=r"data.vocab = 257"):  # also of what is there already
    data.prepare(make_config(vocab=257), log=quiet)


def test_changed_source_files_are_refused_and_vanished_ones_are_not(
  make_config, write_jsonl, texts
):
  cfg = make_config()
  data.prepare(cfg, log=quiet)
  write_jsonl([*texts, "one more"])
  with pytest.raises(DataError, match=r"the files differ from those that .* was made from"):
    data.prepare(cfg, log=quiet)
  os.remove(cfg.path)
  said = []
  data.prepare(cfg, log=said.append)
  assert "its source is not here, and was not compared" in said[0]


def test_contents_of_the_same_length_are_compared_where_a_file_was_touched(make_config):
  cfg, said = make_config(), []
  dataset = data.prepare(cfg, log=quiet)
  source = pathlib.Path(cfg.path)
  text, times = source.read_bytes(), os.stat(source)
  source.write_bytes(text)  # the same again
  for _ in range(2):
    data.prepare(cfg, log=said.append)
  assert len(said) == 1 and "comparing its contents" in said[0], "once, and not in every start"
  source.write_bytes(text.replace(b"e", b"o", 1))
  os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times does
  for _ in range(2):
    with pytest.raises(DataError, match=r"differ from .* other contents\); restore them"):
      data.prepare(cfg, log=quiet)
  meta = pathlib.Path(dataset.path("meta.json"))  # as older versions wrote it
  described = json.loads(meta.read_text())
  del described["inputs"]["content"], described["sha256"]
  meta.write_text(json.dumps(described))
  os.utime(meta, (0, 0))
  data.prepare(cfg, log=quiet)


@pytest.mark.parametrize("path", ["text/*.jsonl", "{tmp}/link/text/*.jsonl"])
def test_another_corpus_of_the_same_names_and_sizes_is_refused(
  make_config, texts, tmp_path, monkeypatch, path
):
  """In another folder, behind a redirected link, or in a folder renamed to the first one's name;
  all files are older than the dataset."""
  others = [text.replace("document", "monument") for text in texts]
  for name, contents in (("a", texts), ("copy", texts), ("b", others)):
    (tmp_path / name / "text").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in contents)
    (tmp_path / name / "text" / "all.jsonl").write_text(lines)
  cfg, link = make_config(path=path.format(tmp=tmp_path)), tmp_path / "link"

  def said(place):
    monkeypatch.chdir(tmp_path / place)
    link.unlink(missing_ok=True)
    link.symlink_to(place)
    lines = []
    data.prepare(cfg, log=lines.append)
    return lines

  said("a")
  with monkeypatch.context() as patched:
    patched.setattr(splits, "sum_of_contents", None)
    assert said("a") == [], "an unchanged source is not read again"
  with pytest.raises(DataError, match=r"data.path = .*other contents\).*another data.directory"):
    said("b")
  assert ["comparing its contents" in line for line in said("copy")] == [True]
  assert said("copy") == [], "once, and not in every start"
  said("a")
  (tmp_path / "a").rename(tmp_path / "former")
  (tmp_path / "b").rename(tmp_path / "a")
  with pytest.raises(DataError, match="other contents"):
    said("a")
  (tmp_path / "a").rename(tmp_path / "b")
  (tmp_path / "former").rename(tmp_path / "a")
  meta = pathlib.Path(data.dataset_directory(cfg), "meta.json")  # as older versions wrote it
  described = json.loads(meta.read_text())
  del described["places"], described["sha256"]
  meta.write_text(json.dumps(described))
  assert said("a") == []


def test_a_file_that_changes_while_it_is_read_is_refused(make_config, monkeypatch):
  cfg, open_split = make_config(), splits.split_documents

  def meanwhile(cfg):
    yield from open_split(cfg)
    os.utime(cfg.path)

  monkeypatch.setattr(splits, "split_documents", meanwhile)
  with pytest.raises(DataError, match=r"data.path = .*: a file was changed while it was read"):
    data.prepare(cfg, log=quiet)
  assert not [name for name in os.listdir(cfg.directory) if not name.endswith(".lock")]


@pytest.mark.parametrize("tokenizer, vocab", [("bytes", 258), ("sentencepiece", 320)])
@pytest.mark.parametrize("reader", ["shards", "tfds"])
def test_an_empty_split_is_refused(make_config, reader, tokenizer, vocab):
  fields = {"reader": reader, "tokenizer": tokenizer, "vocab": vocab}
  with pytest.raises(
    DataError,
    match=r"data.validation = 'newest:60': leaves no document for the train split; hold out fewer",
  ):
    data.prepare(make_config(validation="newest:60", **fields), log=quiet)
  with pytest.raises(
    DataError,
    match=r"'fraction:0.000001': leaves no document for the validation split; hold out more",
  ):
    data.prepare(make_config(validation="fraction:0.000001", **fields), log=quiet)


def test_a_separator_that_the_tokenizer_lacks_is_refused(make_config, monkeypatch):
  monkeypatch.setattr(tokenizers.Bytes, "bos", None)
  with pytest.raises(
    DataError, match=r"data.separator = 'bos': the tokenizer 'bytes' has no such token"
  ):
    data.prepare(make_config(separator="bos"), log=quiet)


# ---- TFDS records ----


def test_records_hold_what_shards_hold(make_config):
  in_shards = data.prepare(make_config(), log=quiet)
  in_records = data.prepare(make_config(reader="tfds"), log=quiet)
  assert decoded(in_records, "validation") == decoded(in_shards, "validation")
  for what in ("documents", "tokens", "bytes"):
    assert in_records.meta["splits"]["train"][what] == in_shards.meta["splits"]["train"][what]
  records = tfds.Records(
    in_records.meta["records"]["path"].format(directory=in_records.directory), "tokens"
  )
  found = [in_records.tokenizer.decode(records[i].content) for i in range(len(records))]
  assert sorted(found) == sorted(decoded(in_shards, "train"))
  data.verify(in_records)
  with pytest.raises(
    DataError, match=r"the train documents are TFDS records; set data.reader = 'tfds'"
  ):
    in_records.stream("train")


@pytest.mark.parametrize(
  "rule, count", [("newest:5", 5), ("fraction:0.2", None), ("path:{path}@train[:7]", 7)]
)
def test_a_tfds_dataset_is_trained_on_where_it_lies(tmp_path, make_config, texts, rule, count):
  path = tfds.write_documents(iter(texts), str(tmp_path / "tfds"))
  cfg = make_config(
    source="tfds",
    path=path,
    reader="tfds",
    validation=rule.format(path=path),
    tokenizer="sentencepiece",
    vocab=320,
  )
  dataset = data.prepare(cfg, log=quiet)
  assert dataset.tokens("train") is None and not any(
    "record" in name for name in dataset.meta["files"]
  )
  held = decoded(dataset, "validation")
  stored = [document.content for document in tfds.read_split(path, "text")]
  expected = {
    "n": stored[-5:],
    "f": [text for text in stored if splits.is_held_out(text, 0.2)],
    "p": stored[:7],
  }
  assert held == expected[rule[0]] and (count is None or len(held) == count)


@pytest.mark.parametrize("reader", ["shards", "tfds"])
@pytest.mark.parametrize("rule", ["newest:5", "path:{tmp}/held.jsonl", "fraction:0.3"])
def test_validation_text_that_is_trained_on_is_told(
  make_config, write_jsonl, texts, tmp_path, rule, reader
):
  texts = [*texts[:50], texts[3], "", "new", texts[4], texts[3]]
  write_jsonl([*texts[-5:]], "held.jsonl")
  path = write_jsonl(["", *texts][: -5 if rule[0] == "p" else None], "all.jsonl")
  for again in range(2):  # of what is there already, too
    said = []
    cfg = make_config(path=path, validation=rule.format(tmp=tmp_path), reader=reader)
    data.prepare(cfg, log=said.append)
    told = [line for line in said if "also stand in the training text" in line]
    assert len(told) == (rule[0] != "f"), again
    assert all("3 of 5 validation documents" in line for line in told)


def test_progress_is_told(make_config, monkeypatch):
  monkeypatch.setattr(encoding, "REPORT_SECONDS", -1)
  monkeypatch.setattr(encoding, "ENCODE_AT_ONCE", 100)
  said = []
  data.prepare(make_config(), log=said.append)
  assert sum("documents" in line and "MB/s" in line for line in said) > 10


def test_the_command_prepares_verifies_and_says_so(make_config, capsys):
  dataset = data.prepare(make_config(reader="tfds"), log=quiet)
  lines = prepare.describe_dataset(dataset).splitlines()
  assert (
    dataset.directory in lines[0]
    and "train: 55 documents" in lines[1]
    and "validation: 5 documents" in lines[2]
  )


def test_shards_need_neither_tfds_nor_pyarrow():
  """Reading token shards imports little, so that opening a dataset takes milliseconds."""
  heavy = {"tensorflow_datasets", "pyarrow", "torch", "tensorflow"}
  code = f"import sys, beyond_outliers.data; print(sys.modules.keys() & {heavy})"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert result.stdout.strip() == "set()"


def test_the_command(tmp_path):
  """Prepares the bundled text, finds it again and verifies it; what is wrong is said in a line."""

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "beyond_outliers.prepare", *arguments],
      capture_output=True,
      text=True,
      cwd=ROOT,
    )

  argument = f"--config=configs/adamw.py:nano,data.tokenizer=bytes,data.directory={tmp_path}"
  result = run(argument, "--verify")
  assert result.returncode == 0, result.stderr
  assert (
    "files are as they were written" in result.stdout and "train: 239 documents" in result.stdout
  )
  for path in tmp_path.glob("*/train-00000.bin"):
    path.write_bytes(b"x" * path.stat().st_size)
  result = run(argument, "--verify")
  assert result.returncode and "contents are not those that were prepared" in result.stderr


@pytest.mark.parametrize("in_the_way", ["folder", "above", "dataset", "lock"])
def test_a_folder_that_datasets_cannot_go_into_is_refused_first(tmp_path, make_config, in_the_way):
  cfg = make_config(path=str(tmp_path / "none.jsonl"))  # which is looked for later
  folder, directory = tmp_path / "datasets", pathlib.Path(data.dataset_directory(cfg))
  if in_the_way == "above":
    cfg = make_config(directory=str(tmp_path / "datasets" / "below"))
  if in_the_way in ("folder", "above"):
    folder.write_text("x")
  else:
    folder.mkdir()
  if in_the_way == "dataset":
    directory.write_text("x")
  if in_the_way == "lock":
    folder.joinpath(f"{directory.name}.lock").mkdir()
  with pytest.raises(DataError, match=rf"data.directory = '{cfg.directory}': .*; give a folder to"):
    data.prepare(cfg, log=quiet)


@pytest.mark.parametrize("content", ["", '{"format": 1, "set', "[1]", '{"format": 1}', "{}"])
def test_a_description_that_was_not_written_is_refused(make_config, content):
  dataset = data.prepare(make_config(), log=quiet)
  pathlib.Path(dataset.path("meta.json")).write_text(content)
  with pytest.raises(DataError, match=r"/meta.json: .*; delete the folder and prepare again"):
    data.open(dataset.directory)


@pytest.mark.parametrize("reader", ["shards", "tfds"])
def test_a_folder_of_any_name_gives_back_what_was_prepared_in_it(
  tmp_path, make_config, texts, reader
):
  """Also where an @ would begin a split, and braces a field to be filled in."""
  plain = data.prepare(make_config(reader=reader), log=quiet)
  folder = tmp_path / "ada@host" / "lr=[1e-3] {x} 100% *"
  (folder / "texts").mkdir(parents=True)
  path = folder / "texts" / "corpus.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  cfg = make_config(reader=reader, directory=str(folder / "datasets"))
  found = data.prepare(cfg, log=quiet)
  assert found.fingerprint == plain.fingerprint
  for made in (found, data.open(found.directory)):
    batches = [
      next(data.train_batches(dataset, cfg, context=16, batch_size=4, seed=0))
      for dataset in (plain, made)
    ]
    np.testing.assert_array_equal(batches[0]["tokens"], batches[1]["tokens"])
  by_name = make_config(path=str(path), directory=str(tmp_path / "others"))
  assert data.prepare(by_name, log=quiet).meta["inputs"] == plain.meta["inputs"]


def test_a_tfds_dataset_in_a_folder_with_braces_is_read_in_place(tmp_path, make_config, texts):
  path = tfds.write_documents(iter(texts), str(tmp_path / "{directory}" / "{x}@y"))
  cfg = make_config(source="tfds", path=path, reader="tfds")
  dataset = data.prepare(cfg, log=quiet)
  batch = next(data.train_batches(dataset, cfg, context=16, batch_size=4, seed=0))
  assert batch["tokens"].shape == (4, 16)


def test_a_prepared_dataset_outlives_the_file_of_its_tokenizer(tmp_path, make_config, texts):
  file = tmp_path / "x.model"
  file.write_bytes(tokenizer_training.train_sentencepiece(texts, 320))
  cfg, said = make_config(tokenizer=f"sentencepiece:{file}", vocab=400), []
  made = data.prepare(cfg, log=quiet)
  file.unlink()
  assert data.prepare(cfg, log=said.append).fingerprint == made.fingerprint
  assert said == [
    f"prepare: using {made.directory}; its tokenizer {file} is not here, and was not compared"
  ]
