"""Training of tokenizers: repeatable, of all the text, and refused where the text is too little."""

import pytest

from beyond_outliers.data import tokenizer_training
from beyond_outliers.errors import DataError


def test_training_repeats_to_the_byte(speeches, sentencepiece):
  again = tokenizer_training.train_sentencepiece(speeches, 1000)
  assert again == sentencepiece._files["tokenizer.model"]


@pytest.mark.parametrize("vocab", [50, 100_000])
def test_a_vocabulary_that_the_documents_do_not_support_is_refused(vocab):
  with pytest.raises(
    DataError, match=f"data.vocab = {vocab}: cannot train a SentencePiece model of that size"
  ):
    tokenizer_training.train_sentencepiece(["some words"] * 9, vocab)


def test_long_lines_are_trained_on():
  """The trainer skips sentences over its limit without a word, so they must come in pieces."""
  pieces = list(tokenizer_training._sentences(["a" * 10_000 + "\nshort"]))
  assert (
    "".join(pieces) == "a" * 10_000 + "short"
    and max(map(len, pieces)) <= tokenizer_training.MAX_SENTENCE
  )
