"""Rows of texts that share their beginnings."""

import collections

import numpy as np
import pytest

from beyond_outliers.evaluate import packing
from beyond_outliers.evaluate.packing import ScoredText

LENGTH, ROWS = 32, 4


def length_of(tokens):
  return LENGTH if tokens <= LENGTH else 2 * LENGTH


@pytest.fixture
def texts():
  """Questions of two to five choices, some of one token and some that begin others; and texts that
  begin alike, are alone, or fill the longest row."""
  draw, found = np.random.default_rng(0), set()
  for _ in range(40):
    context = tuple(draw.integers(0, 9, draw.integers(1, 20)).tolist())
    for _ in range(draw.integers(2, 6)):
      choice = tuple(draw.integers(0, 9, draw.choice([1, 1, 2, 3, 8])).tolist())
      found |= {ScoredText(context + choice, len(choice)), ScoredText((*context, *choice, 3), 1)}
  shots = tuple(draw.integers(0, 9, 24).tolist())
  found |= {ScoredText((*shots, i, i + 1, 7), 1) for i in range(5)} | {ScoredText((4,) * 65, 64)}
  return sorted(found)


def test_a_scored_token_sees_its_own_text_and_nothing_else(texts):
  rows = packing.packed(texts, length_of)
  seen = collections.Counter()
  for batch in packing.packed_batches(texts, rows, lambda length: ROWS):
    length = batch.tokens_RxL.shape[1]
    assert all(x.shape[:2] == (ROWS, length) for x in batch.arrays) and length in (32, 64)
    for number, row, places in batch.members:
      text, before = texts[number], len(texts[number].tokens) - texts[number].scored
      seen[number] += 1
      np.testing.assert_array_equal(batch.targets_RxS[row, places], text.tokens[before:])
      for i, source in enumerate(batch.sources_RxS[row, places]):
        first, last = batch.segment_ids_RxLx2[row].T
        keys = np.flatnonzero((np.arange(length) <= source) & (first <= source) & (source <= last))
        assert tuple(batch.tokens_RxL[row, keys]) == text.tokens[: before + i]
        np.testing.assert_array_equal(batch.positions_RxL[row, keys], np.arange(before + i))
    asked = sum(texts[number].scored for number, _, _ in batch.members)
    assert (batch.sources_RxS >= 0).sum() == asked
  assert seen == dict.fromkeys(range(len(texts)), 1)


def test_contexts_and_examples_before_questions_are_read_once():
  choices = [ScoredText((1, 2, 3, 4, choice), 1) for choice in range(6)]
  ((tree,),) = (row.trees for row in packing.packed(choices, length_of))
  assert (tree.tokens, tree.scored) == (4, 6)
  shots = tuple(range(16))
  questions = [ScoredText((*shots, i, i + 1, choice), 1) for i in range(5) for choice in (7, 8)]
  ((tree,),) = (row.trees for row in packing.packed(questions, length_of))
  assert (tree.tokens, tree.scored) == (16 + 5 * 2, 10)


def test_no_two_rows_would_fit_into_one(texts):
  filled = collections.defaultdict(list)
  for row in packing.packed(texts, length_of):
    filled[row.length].append(sum(tree.size for tree in row.trees))
  assert len(filled[LENGTH]) > 10 and len(filled[2 * LENGTH]) == 1
  for length, sizes in filled.items():
    assert max(sizes) <= length < sum(sorted(sizes)[:2]) or len(sizes) == 1


def test_what_is_alone_shares_nothing(texts):
  rows = packing.alone(texts, length_of)
  assert [[tree.texts for tree in row.trees] for row in rows] == [
    [[(number, 0)]] for number in range(len(texts))
  ]
