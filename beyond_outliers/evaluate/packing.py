"""Texts packed into few rows of few lengths. Shared beginnings are stored once: a question's
context is read once for all its choices.

A row holds trees of texts, depth first; a token attends only to its own text's tokens, as if that
text were alone (`Transformer`'s segment ids of a tree).

Legend: R rows of a batch, L their length, S scored positions of a row.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class ScoredText(NamedTuple):
  """Tokens of which the last `scored` are scored, each given those before it."""

  tokens: tuple[int, ...]
  scored: int

  @property
  def read(self) -> tuple[int, ...]:
    return self.tokens[:-1]


@dataclasses.dataclass
class Tree:
  """Texts that share their beginnings, for a row of `length` tokens."""

  length: int
  texts: list[tuple[int, int]]  # (number of the text, tokens it shares with the one before it)
  tokens: int  # shared ones counted once
  scored: int

  @property
  def size(self) -> int:
    """Places that it takes in its row: tokens, or scored positions where these are more."""
    return max(self.tokens, self.scored)

  def take(self, number: int, text: ScoredText, shared: int) -> bool:
    """Adds a text; False if there is no room for it."""
    tokens, scored = self.tokens + len(text.read) - shared, self.scored + text.scored
    if max(tokens, scored) > self.length:
      return False
    self.texts.append((number, shared))
    self.tokens, self.scored = tokens, scored
    return True


class PackedRow(NamedTuple):
  """Trees side by side in a row."""

  length: int
  trees: list[Tree]

  @property
  def scored(self) -> int:
    return sum(tree.scored for tree in self.trees)


class PackedBatch(NamedTuple):
  """Rows as arrays; those at the end may be empty."""

  members: list[tuple[int, int, slice]]  # (number of a text, its row, its scored positions there)
  tokens_RxL: np.ndarray
  positions_RxL: np.ndarray  # of a token in its text
  segment_ids_RxLx2: np.ndarray
  sources_RxS: np.ndarray  # place in the row from which a target is predicted; -1: no target
  targets_RxS: np.ndarray

  @property
  def arrays(self) -> tuple[np.ndarray, ...]:
    return self[1:]


def packed(texts: Sequence[ScoredText], length_of: Callable[[int], int]) -> list[PackedRow]:
  """Packs sorted texts into rows. length_of: number of tokens -> length of a row for them."""
  rows: list[PackedRow] = []
  room: list[tuple[int, int]] = []  # (places left in a row, number of the row), ascending
  for tree in sorted(_trees(texts, length_of), key=lambda x: (x.length, x.size), reverse=True):
    # Best fit: the row with the least room that suffices.
    i = bisect.bisect_left(room, (tree.size, 0))
    left, number = room.pop(i) if i < len(room) else (tree.length, len(rows))
    if number == len(rows):
      rows.append(PackedRow(tree.length, []))
    rows[number].trees.append(tree)
    bisect.insort(room, (left - tree.size, number))
  return rows


def alone(texts: Sequence[ScoredText], length_of: Callable[[int], int]) -> list[PackedRow]:
  """Every text in a row of its own."""
  trees = (_seedling(number, text, length_of) for number, text in enumerate(texts))
  return [PackedRow(tree.length, [tree]) for tree in trees]


def _seedling(number: int, text: ScoredText, length_of: Callable[[int], int]) -> Tree:
  return Tree(length_of(len(text.read)), [(number, 0)], len(text.read), text.scored)


def _trees(texts: Sequence[ScoredText], length_of: Callable[[int], int]) -> list[Tree]:
  """Trees of sorted texts. A text joins the tree of the one before if they share all of its tokens
  before the first scored one, or half of all: a task's few-shot examples, for instance."""
  trees: list[Tree] = []
  for number, text in enumerate(texts):
    shared = _common(texts[number - 1].read, text.read) if number else 0
    context = len(text.read) - text.scored + 1
    goes_on = trees and shared >= min(context, len(text.read) / 2)
    if not (goes_on and trees[-1].take(number, text, shared)):
      trees.append(_seedling(number, text, length_of))
  return trees


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """Length of the common prefix."""
  differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
  return next(differ, min(len(a), len(b)))


def packed_batches(
  texts: Sequence[ScoredText], rows: Sequence[PackedRow], rows_of: Callable[[int], int]
) -> Iterator[PackedBatch]:
  """Batches of all rows, the longest first, and among equals those with the most to score; an
  incomplete batch takes in shorter rows. rows_of: length -> rows of a batch."""
  rest = sorted(rows, key=lambda row: (row.length, row.scored), reverse=True)
  while rest:
    count = rows_of(rest[0].length)
    yield _batch(texts, rest[:count], count)
    del rest[:count]


def _batch(texts: Sequence[ScoredText], rows: Sequence[PackedRow], count: int) -> PackedBatch:
  length = rows[0].length
  tokens_RxL, positions_RxL, targets_RxS = np.zeros((3, count, length), np.int32)
  # A padding token attends to itself alone.
  segment_ids_RxLx2 = np.tile(np.arange(length, dtype=np.int32)[:, None], (count, 1, 2))
  sources_RxS = np.full((count, length), -1, np.int32)
  members = []
  for r, row in enumerate(rows):
    end = scored = 0
    for tree in row.trees:
      places = np.zeros(0, int)  # of the previous text's tokens in the row
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
