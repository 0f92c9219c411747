"""Documents for the tests of the data package: short, uneven, and with what tokenizers stumble
over."""

import os

import numpy as np

from beyond_outliers import data
from beyond_outliers.data import shards

WORDS = (
  "the",
  "house",
  "of",
  "representatives",
  "met\n",
  "and",
  "naïve",
  "漢字",
  "\ttabs",
  "  spaces",
  "1789",
  "—",
)


def make_texts(count: int, seed: int = 0) -> list[str]:
  rng = np.random.default_rng(seed)
  return [
    f"document {i}: " + " ".join(rng.choice(WORDS, rng.integers(1, 30))) for i in range(count)
  ]


def quiet(message: str) -> None:
  """A log that keeps still."""


def prepare_in_child(cfg, killed, queue):
  """What a process of its own does; killed: once everything but meta.json is written."""
  if killed:
    shards.write_meta = lambda *args: os._exit(9)
  queue.put((data.prepare(cfg, log=queue.put).fingerprint, os.getpid()))
