"""Log-likelihoods and greedy continuations of token sequences, for the harness's tasks, in few
compiled shapes.

Legend: R rows of a batch, L their length, S scored positions of a row, C of these that the head
sees at once, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import config
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import packing
from beyond_outliers.evaluate.packing import ScoredText
from beyond_outliers.model import loss
from beyond_outliers.types import LanguageModel, Params

SHORTEST = 16  # the smallest bucket of lengths
SHORTEST_ROW = 256  # the shortest row of several texts
BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 1024  # fits the caches: with 8192, nano takes twice as long per token
CHUNKS = 16  # in which the scored positions of a row go through the head
AT_ONCE = 16  # tokens by which a row grows between two checks for its end
NOT_FINITE = -1  # in place of a token, where some logits are NaN or infinite


class Pair(NamedTuple):
  """A continuation and the context read before it: at least one token each."""

  context: Sequence[int]
  continuation: Sequence[int]


class Scorer:
  """A model behind a few compiled programs, one per length of rows.

  context: the longest window in tokens. batch_tokens: tokens of a batch on one device, padding
  included; by default as many as suit the device. mesh: its data and fsdp axes split the rows, and
  the parameters must have been placed on it; by default the first device. ids: those allowed in
  greedy continuations, by default all; where the vocabulary is padded, give the tokenizer's ids.
  Probabilities are those of the softmax over the whole vocabulary, padding included, as in
  training.

  Every process of a run makes the same calls and gets the same results."""

  def __init__(
    self,
    model: LanguageModel,
    params: Params,
    *,
    context: int,
    mesh: jax.sharding.Mesh | None = None,
    batch_tokens: int | None = None,
    ids: Sequence[int] | np.ndarray | None = None,
  ):
    self.context = context
    self._params = params
    self._mesh = mesh or mesh_lib.make_mesh(config.Mesh(1, 1, 1), jax.local_devices()[:1])
    self._ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    on_cpu = self._mesh.devices.flat[0].platform == "cpu"
    self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS)
    everywhere = mesh_lib.replicated(self._mesh)  # so that every process can read everything
    self._score = jax.jit(functools.partial(score, model), out_shardings=everywhere)
    all_ids = np.arange(model.config.vocab)
    known_V = np.isin(all_ids, all_ids if ids is None else ids)
    self._extend = jax.jit(functools.partial(extend, model, known_V), out_shardings=everywhere)

  def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Scores of pairs: the continuation's log-probability in nats, and whether all its tokens are
    the model's first choices.

    A pair of more than context + 1 tokens loses its beginning. Equal pairs are scored once, and
    shared beginnings are read once (packing.py). Errors: ConfigError for an empty context, and for
    a continuation that is empty, or longer than the window on its own."""
    for context, continuation in pairs:
      if not context or not 0 < len(continuation) <= self.context:
        raise ConfigError(
          f"context = {self.context}: a window of this length cannot hold {len(continuation)} "
          f"tokens to score after {len(context)}; expected at least one of each, and no more than "
          "fit"
        )
    asked = [
      ScoredText((*context, *continuation)[-(self.context + 1) :], len(continuation))
      for context, continuation in pairs
    ]
    texts = sorted(set(asked))
    results = self._scores(texts, packing.packed(texts, self._row_length))
    # NaN spreads to other texts of its row, since zero times NaN is NaN: score these alone.
    broken = [text for text in texts if not math.isfinite(results[text][0])]
    results |= self._scores(broken, packing.alone(broken, self._length))
    return [results[text] for text in asked]

  def _scores(
    self, texts: Sequence[ScoredText], rows: Sequence[packing.PackedRow]
  ) -> dict[ScoredText, tuple[float, bool]]:
    results: dict[ScoredText, tuple[float, bool]] = {}

    def collect(batch, outputs):
      nll_RxS, first_RxS = map(np.asarray, outputs)
      for number, row, places in batch.members:
        log_p = -float(nll_RxS[row, places].sum(dtype=np.float64))
        results[texts[number]] = log_p, bool(first_RxS[row, places].all())

    started = None  # a batch's results are fetched while the next one runs
    for batch in packing.packed_batches(texts, rows, self._rows):
      running = batch, self._run(self._score, *batch.arrays)
      if started:
        collect(*started)
      started = running
    if started:
      collect(*started)
    return results

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ended: Callable[[int, list[int]], bool],
  ) -> list[list[int]]:
    """Greedy continuations of at most `limits` tokens; a long prompt loses its beginning.

    ended(number of the prompt, tokens so far) -> whether to stop; asked every AT_ONCE tokens, so
    that up to AT_ONCE - 1 tokens may follow the end. Nothing is cached between tokens: each costs a
    pass over its row. What follows a NOT_FINITE is arbitrary.
    Errors: ConfigError for an empty prompt, or a limit that leaves no room for one token of it."""
    for prompt, limit in zip(prompts, limits, strict=True):
      if not prompt or not 0 < limit < self.context:
        raise ConfigError(
          f"context = {self.context}: a window of this length cannot hold {limit} new tokens after "
          f"{len(prompt)}; expected at least one of each"
        )
    kept = [
      list(prompt)[-(self.context - limit) :] for prompt, limit in zip(prompts, limits, strict=True)
    ]
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(
      range(len(prompts)), key=lambda number: len(kept[number]) + limits[number], reverse=True
    )
    while order:
      rows = self._rows(self._length(len(kept[order[0]]) + limits[order[0]]))
      members = order[:rows]
      del order[:rows]
      running = set(members)
      while running:
        sequences = [kept[member] + results[member] for member in members]
        length = self._length(min(max(map(len, sequences)) + AT_ONCE, self.context))
        tokens_RxL, lengths_R = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
        for row, sequence in enumerate(sequences):
          tokens_RxL[row, : len(sequence)], lengths_R[row] = sequence[:length], len(sequence)
        new_RxA = np.asarray(self._run(self._extend, tokens_RxL, lengths_R))
        for row, member in enumerate(members):
          if member in running:
            results[member] = [*results[member], *new_RxA[row].tolist()][: limits[member]]
            so_far = results[member]
            broken = NOT_FINITE in so_far
            if broken or len(so_far) == limits[member] or ended(member, so_far):
              running.remove(member)
    return results

  def _run(self, program: Callable[..., Any], *arrays: np.ndarray) -> Any:
    rows = len(arrays[0])
    placed = mesh_lib.put_batch(arrays, self._mesh, rows)
    with mesh_lib.use(self._mesh):
      return program(self._params, *placed)

  def _rows(self, length: int) -> int:
    return max(1, self.batch_tokens // length) * self._ways

  def _row_length(self, tokens: int) -> int:
    """The bucket of a row that holds several texts: a power of two."""
    return max(next_power_of_two(tokens), SHORTEST_ROW)

  def _length(self, tokens: int) -> int:
    """The bucket of a single text: a power of two, or 3/4 of one, and at most the context."""
    above = max(next_power_of_two(tokens), SHORTEST)
    return min(above * 3 // 4 if tokens <= above * 3 // 4 else above, self.context)


def next_power_of_two(n: int) -> int:
  """The smallest power of two that is at least n."""
  return 1 << (n - 1).bit_length()


def score(model, params, tokens_RxL, positions_RxL, segment_ids_RxLx2, sources_RxS, targets_RxS):
  """Negative log-likelihood of every target in nats, and whether it is the argmax, [R, S] each.

  float32 at least. sources: positions from which targets are predicted; -1 where there is no target
  and the result is arbitrary. Only columns with a target in some row go through the head, C at a
  time."""
  x_RxLxD = model.apply(
    {"params": params}, tokens_RxL, segment_ids_RxLx2, positions_RxL, method="hidden"
  )
  R, S = targets_RxS.shape
  C = max(1, S // CHUNKS)

  def predict(i, found):
    sources_RxC, targets_RxC = (
      jax.lax.dynamic_slice_in_dim(x_RxS, i * C, C, axis=1) for x_RxS in (sources_RxS, targets_RxS)
    )
    x_RxCxD = jnp.take_along_axis(x_RxLxD, sources_RxC[..., None], axis=1)
    logits_RxCxV = model.apply({"params": params}, x_RxCxD, method="logits")
    nll = loss.cross_entropy(loss.flat_logits(logits_RxCxV), targets_RxC.reshape(-1))
    new = nll.reshape(R, C), jnp.argmax(logits_RxCxV, axis=-1) == targets_RxC
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(x_RxS, x_RxC.astype(x_RxS.dtype), i * C, axis=1)
      for x_RxS, x_RxC in zip(found, new, strict=True)
    )

  asked = jnp.sum(jnp.any(sources_RxS >= 0, axis=0))
  nothing = jnp.zeros((R, S), x_RxLxD.dtype), jnp.zeros((R, S), bool)
  return jax.lax.fori_loop(0, (asked + C - 1) // C, predict, nothing)


def extend(model, known_V, params, tokens_RxL, lengths_R):
  """The AT_ONCE greedy tokens that follow the first lengths_R tokens of each row, [R, AT_ONCE].

  known_V: ids that may be generated. Tokens beyond position L are arbitrary."""
  rows = jnp.arange(len(tokens_RxL))

  def append(tokens_RxL, step):
    positions_R = jnp.minimum(lengths_R + step, tokens_RxL.shape[1]) - 1
    x_RxLxD = model.apply({"params": params}, tokens_RxL, method="hidden")
    x_RxD = jnp.take_along_axis(x_RxLxD, positions_R[:, None, None], axis=1)[:, 0]
    logits_RxV = model.apply({"params": params}, x_RxD, method="logits")
    likeliest_R = jnp.argmax(jnp.where(known_V, logits_RxV, -jnp.inf), axis=-1)
    finite_R = jnp.isfinite(jnp.where(known_V, logits_RxV, 0)).all(axis=-1)
    new_R = jnp.where(finite_R, likeliest_R, NOT_FINITE).astype(tokens_RxL.dtype)
    return tokens_RxL.at[rows, lengths_R + step].set(jnp.maximum(new_R, 0), mode="drop"), new_R

  _, new_AxR = jax.lax.scan(append, tokens_RxL, jnp.arange(AT_ONCE))
  return new_AxR.T
