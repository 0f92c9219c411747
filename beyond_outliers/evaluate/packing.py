"""Texts packed into few rows of few lengths, beginnings that they share written once: a question's
context is read once for all its choices.

A row holds trees of texts, depth first; a token attends to those of its own text alone, as if that
stood by itself (`Transformer`'s segment ids of a tree).

Legend: R rows of a batch, L their length, S scored positions of a row.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class ScoredText(NamedTuple):
  """Tokens, of which the last few are scored, each from those before it."""

  tokens: tuple[int, ...]
  scored: int

  @property
  def read(self) -> tuple[int, ...]:
    return self.tokens[:-1]


@dataclasses.dataclass
class Tree:
  """Texts that share their beginnings, for a row of `length` tokens."""

  length: int
  texts: list[tuple[int, int]]  # number of the text, tokens it shares with the one before it
  tokens: int  # each shared one once
  scored: int

  @property
  def size(self) -> int:
    """Places that it takes of its row: of tokens, or of scored positions where these are more."""
    return max(self.tokens, self.scored)

  def take(self, number: int, text: ScoredText, shared: int) -> bool:
    """Adds a text that there is room for; False if there is none."""
    tokens, scored = self.tokens + len(text.read) - shared, self.scored + text.scored
    if max(tokens, scored) > self.length:
      return False
    self.texts.append((number, shared))
    self.tokens, self.scored = tokens, scored
    return True


class PackedRow(NamedTuple):
  """Trees beside one another in a row."""

  length: int
  trees: list[Tree]

  @property
  def scored(self) -> int:
    return sum(tree.scored for tree in self.trees)


class PackedBatch(NamedTuple):
  """Rows as arrays; those at the end may be empty."""

  members: list[tuple[int, int, slice]]  # number of a text, its row, its scored positions there
  tokens_RxL: np.ndarray
  positions_RxL: np.ndarray  # of a token in its text
  segment_ids_RxLx2: np.ndarray
  sources_RxS: np.ndarray  # from which place of its row a target is predicted; -1: none is
  targets_RxS: np.ndarray

  @property
  def arrays(self) -> tuple[np.ndarray, ...]:
    return self[1:]


def packed(texts: Sequence[ScoredText], length_of: Callable[[int], int]) -> list[PackedRow]:
  """Rows of texts that are sorted. length_of: tokens -> length of the rows for so many."""
  rows: list[PackedRow] = []
  room: list[tuple[int, int]] = []  # places left in a row, and its number; ascending
  for tree in sorted(_trees(texts, length_of), key=lambda x: (x.length, x.size), reverse=True):
    # The row that it fills best, of those that it fits in.
    i = bisect.bisect_left(room, (tree.size, 0))
    left, number = room.pop(i) if i < len(room) else (tree.length, len(rows))
    if number == len(rows):
      rows.append(PackedRow(tree.length, []))
    rows[number].trees.append(tree)
    bisect.insort(room, (left - tree.size, number))
  return rows


def alone(texts: Sequence[ScoredText], length_of: Callable[[int], int]) -> list[PackedRow]:
  """Every text in a row by itself."""
  trees = (_seedling(number, text, length_of) for number, text in enumerate(texts))
  return [PackedRow(tree.length, [tree]) for tree in trees]


def _seedling(number: int, text: ScoredText, length_of: Callable[[int], int]) -> Tree:
  return Tree(length_of(len(text.read)), [(number, 0)], len(text.read), text.scored)


def _trees(texts: Sequence[ScoredText], length_of: Callable[[int], int]) -> list[Tree]:
  """Texts go on from the one before if they share all that comes before what is scored, or half of
  it all, as examples of a task may before their questions."""
  trees: list[Tree] = []
  for number, text in enumerate(texts):
    shared = _common(texts[number - 1].read, text.read) if number else 0
    context = len(text.read) - text.scored + 1
    goes_on = trees and shared >= min(context, len(text.read) / 2)
    if not (goes_on and trees[-1].take(number, text, shared)):
      trees.append(_seedling(number, text, length_of))
  return trees


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """With how many equal tokens both begin."""
  differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
  return next(differ, min(len(a), len(b)))


def packed_batches(
  texts: Sequence[ScoredText], rows: Sequence[PackedRow], rows_of: Callable[[int], int]
) -> Iterator[PackedBatch]:
  """All rows, the longest first, and of these those with the most to score; the last of a length go
  with the next shorter ones. rows_of: length -> rows of a batch."""
  rest = sorted(rows, key=lambda row: (row.length, row.scored), reverse=True)
  while rest:
    count = rows_of(rest[0].length)
    yield _batch(texts, rest[:count], count)
    del rest[:count]


def _batch(texts: Sequence[ScoredText], rows: Sequence[PackedRow], count: int) -> PackedBatch:
  length = rows[0].length
  tokens_RxL, positions_RxL, targets_RxS = np.zeros((3, count, length), np.int32)
  # A token of the padding attends to itself alone.
  segment_ids_RxLx2 = np.tile(np.arange(length, dtype=np.int32)[:, None], (count, 1, 2))
  sources_RxS = np.full((count, length), -1, np.int32)
  members = []
  for r, row in enumerate(rows):
    end = scored = 0
    for tree in row.trees:
      places = np.zeros(0, int)  # of the tokens of the text before
      for number, shared in tree.texts:
        text, before = texts[number], end
        end += len(text.read) - shared
        places = np.concatenate([places[:shared], np.arange(before, end)])
        tokens_RxL[r, before:end] = text.read[shared:]
        positions_RxL[r, before:end] = np.arange(shared, len(text.read))
        segment_ids_RxLx2[r, places, 1] = end - 1
        here = slice(scored, scored + text.scored)
        sources_RxS[r, here] = places[len(places) - text.scored :]
        targets_RxS[r, here] = text.tokens[len(text.tokens) - text.scored :]
        members.append((number, r, here))
        scored = here.stop
  return PackedBatch(
    members, tokens_RxL, positions_RxL, segment_ids_RxLx2, sources_RxS, targets_RxS
  )
