"""Types that many rooms share."""

from __future__ import annotations

import os
from typing import Any, Protocol, TypedDict

import jax
import numpy as np

PathLike = str | os.PathLike[str]
Json = dict[str, Any]  # what a JSON object holds
Params = Any  # a model's parameters: nested dictionaries of arrays, layers stacked
Metrics = dict[str, jax.Array]  # scalars by name, as a compiled step returns them

Array = jax.Array | np.ndarray


class Batch(TypedDict):
  """What data hand to a step, int32 [B, L] each, weights aside."""

  tokens: Array
  targets: Array  # the tokens that follow
  segment_ids: Array  # of documents, from 1; 0: padding
  positions: Array  # within the document
  weights: Array  # float32: 1 where a target counts, else 0


class LanguageModel(Protocol):
  """The contract of a model: apply({"params": params}, tokens_BxL, segment_ids=None,
  positions=None) -> logits_BxLxV, layers under `layers` stacked by depth."""

  @property
  def config(self) -> Any: ...
  @property
  def apply(self) -> Any: ...
  @property
  def clone(self) -> Any: ...
  def contractions(self) -> dict[str, tuple[int, bool]]: ...
  def block(self, depth: int) -> Any: ...
