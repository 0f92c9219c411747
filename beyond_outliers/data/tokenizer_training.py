"""Training of a dataset's tokenizer, where the configuration names no file of an existing one."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator

from beyond_outliers import config
from beyond_outliers.data import splits, tokenizers
from beyond_outliers.data.document import Document
from beyond_outliers.errors import DataError

SAMPLE_BYTES = 64 << 20  # of the corpus, approximately, that a model is trained on
# Characters. Longer sentences are cut, since the trainer skips those over its limit in bytes.
MAX_SENTENCE = 4096


def trained_tokenizer(
  sample: Iterable[Document],
  cfg: config.Data,
  directory: str,
  log: Callable[[str], None],
  eot: str = "",
) -> tokenizers.Tokenizer:
  """A tokenizer trained on documents; its model is written to the dataset's folder. eot: see
  `tokenizers.load`. Errors: DataError if a document is token ids, or there are no documents."""
  began = time.monotonic()
  texts = [_text(document, cfg) for document in sample]
  if not texts:
    raise splits.empty_split(cfg, "train")
  file = os.path.join(directory, "tokenizer.model")
  with open(file, "wb") as stream:
    stream.write(train_sentencepiece(texts, cfg.vocab))
  log(
    f"prepare: trained a SentencePiece model of {cfg.vocab} pieces in "
    f"{time.monotonic() - began:.1f} s"
  )
  return tokenizers.load("sentencepiece:" + file, eot)


def _text(document: Document, cfg: config.Data) -> str:
  if not isinstance(document.content, str):
    raise DataError(
      f"{document.where}: holds token ids, on which no SentencePiece model can be trained "
      f"(data.tokenizer = {cfg.tokenizer!r}); name the tokenizer they come from, such as 'gpt2'"
    )
  return document.content


def train_sentencepiece(texts: Iterable[str], vocab: int) -> bytes:
  """A lossless SentencePiece BPE model of exactly `vocab` pieces, as the bytes of its file.

  BPE because it trains in a second where unigram takes 20, at the same bytes per token on held-out
  text. Nothing is normalized, no space is added or dropped, unknown characters fall back to bytes,
  and newlines, at which the trainer cuts its sentences, are pieces of their own. One thread, so
  that the same texts give the same file. Errors: DataError if the texts don't support the
  vocabulary.
  """
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(texts),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      byte_fallback=True,
      user_defined_symbols=["\n", "\n\n"],
      split_digits=True,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      max_sentence_length=8 * MAX_SENTENCE,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise DataError(
      f"data.vocab = {vocab}: cannot train a SentencePiece model of that size on these documents "
      f"({error})"
    ) from None
  return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for line in text.split("\n"):
      for start in range(0, len(line), MAX_SENTENCE):
        yield line[start : start + MAX_SENTENCE]
