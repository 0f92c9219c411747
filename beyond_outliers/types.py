"""Types that many packages share. Doesn't import JAX: `data` and some commands don't need it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
  import jax
  import numpy as np

PathLike: TypeAlias = str | os.PathLike[str]
Json: TypeAlias = dict[str, Any]  # a JSON object
Params: TypeAlias = Any  # a model's parameters: nested dictionaries of arrays, layers stacked
Array: TypeAlias = "jax.Array | np.ndarray"
Metrics: TypeAlias = "dict[str, jax.Array]"  # scalars by name, as a compiled step returns them


class Batch(TypedDict):
  """Rows of token windows, as fed to a step: [B, L] each; int32, except for the weights."""

  tokens: Array
  targets: Array  # the tokens that follow each token
  segment_ids: Array  # number of the document, from 1; 0: padding
  positions: Array  # within the document
  weights: Array  # float32: 1 where a target counts, else 0


class LanguageModel(Protocol):
  """The contract of a model: apply({"params": params}, tokens_BxL, segment_ids=None,
  positions=None) -> logits_BxLxV, with the parameters under `layers` stacked by depth."""

  @property
  def config(self) -> Any: ...
  @property
  def dot_general_for(self) -> Any: ...
  @property
  def init(self) -> Any: ...
  @property
  def apply(self) -> Any: ...
  @property
  def clone(self) -> Any: ...
  def contractions(self) -> dict[str, tuple[int, bool]]: ...
  def block(self, depth: int) -> Any: ...
