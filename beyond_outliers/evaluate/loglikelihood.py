"""Log-likelihoods and greedy continuations of token sequences, in few compiled shapes, as the
harness's tasks ask for them.

Legend: R rows of a batch, L length of its bucket, S scored positions of a row, C of these that the
head sees at once, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers import config
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.errors import ConfigError
from beyond_outliers.model import loss
from beyond_outliers.types import LanguageModel, Params

SHORTEST = 16  # the smallest bucket of lengths
AT_ONCE = 16  # tokens that a row grows by between two looks for its end
NOT_FINITE = -1  # stands for the token that follows logits of which some are NaN or infinite


class Pair(NamedTuple):
  """A continuation, and the context that is read before it: at least one token each."""

  context: Sequence[int]
  continuation: Sequence[int]


class PackedPairs(NamedTuple):
  """Pairs of about one length, a row each."""

  members: list[int]  # which pair each row holds
  tokens_RxL: np.ndarray
  positions_RxS: np.ndarray  # from which position of its row a target is predicted
  targets_RxS: np.ndarray


class Scorer:
  """A model behind a few compiled programs: one per row length and number of scored positions.

  context: the longest window in tokens. batch_tokens: tokens of a batch on one device, padding
  included. mesh: its data and fsdp axes split the rows, and the parameters must have been placed on
  it; by default the first device. ids: those that greedy continuations are made of, by default all;
  of a vocabulary that is padded above the tokenizer's, the tokenizer's. Probabilities are those of
  the softmax over the whole vocabulary, padding included, as in training.

  Every process of a run makes the same calls and gets the same results."""

  def __init__(
    self,
    model: LanguageModel,
    params: Params,
    *,
    context: int,
    mesh: jax.sharding.Mesh | None = None,
    batch_tokens: int = 8192,
    ids: Sequence[int] | np.ndarray | None = None,
  ):
    self.context = context
    self._params, self._batch_tokens = params, batch_tokens
    self._mesh = mesh or mesh_lib.make_mesh(config.Mesh(1, 1, 1), jax.local_devices()[:1])
    self._ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    everywhere = mesh_lib.replicated(self._mesh)  # so that each process can read all
    self._score = jax.jit(
      functools.partial(score, model), static_argnames="columns", out_shardings=everywhere
    )
    all_ids = np.arange(model.config.vocab)
    known_V = np.isin(all_ids, all_ids if ids is None else ids)
    self._extend = jax.jit(functools.partial(extend, model, known_V), out_shardings=everywhere)

  def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Scores of pairs: the continuation's log-probability in nats, and whether all its tokens are
    the model's first choices.

    A pair of more than context + 1 tokens loses its beginning. Errors: ConfigError for a
    continuation that is empty, or alone longer than the context."""
    for context, continuation in pairs:
      if not context or not 0 < len(continuation) <= self.context:
        raise ConfigError(
          f"context = {self.context}: a window of that holds no {len(continuation)} tokens to "
          f"score after {len(context)}; expected at least one of each, and no more than fit"
        )
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)

    def collect(batch, outputs):
      nll_RxS, first_RxS = map(np.asarray, outputs)
      for row, member in enumerate(batch.members):
        n = len(pairs[member].continuation)
        log_p = -float(nll_RxS[row, :n].sum(dtype=np.float64))
        results[member] = log_p, bool(first_RxS[row, :n].all())

    started = None  # a batch is fetched once the next one runs
    for batch in self._packed(pairs):
      columns = max(1, self._batch_tokens // 4 * self._ways // len(batch.tokens_RxL))
      running = batch, self._run(functools.partial(self._score, columns=columns), *batch[1:])
      if started:
        collect(*started)
      started = running
    if started:
      collect(*started)
    return results

  def _packed(self, pairs: Sequence[Pair]) -> Iterator[PackedPairs]:
    """Batches from the longest bucket to the shortest; leftover pairs go into the next bucket's."""
    shapes = [
      (
        self._length(min(len(context) + len(continuation) - 1, self.context)),
        next_power_of_two(len(continuation)),
      )
      for context, continuation in pairs
    ]
    order = sorted(range(len(pairs)), key=shapes.__getitem__, reverse=True)
    while order:
      length = shapes[order[0]][0]
      members = order[: self._rows(length)]
      del order[: len(members)]
      rows, scored = self._rows(length), max(shapes[member][1] for member in members)
      tokens_RxL, positions_RxS, targets_RxS = (
        np.zeros((rows, n), np.int32) for n in (length, scored, scored)
      )
      for row, member in enumerate(members):
        context, continuation = pairs[member]
        window, n = [*context, *continuation][-(self.context + 1) :], len(continuation)
        tokens_RxL[row, : len(window) - 1] = window[:-1]
        positions_RxS[row, :n] = np.arange(len(window) - 1 - n, len(window) - 1)
        targets_RxS[row, :n] = continuation
      yield PackedPairs(members, tokens_RxL, positions_RxS, targets_RxS)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ended: Callable[[int, list[int]], bool],
  ) -> list[list[int]]:
    """Greedy continuations of at most `limits` tokens; a long prompt loses its beginning.

    ended(number of the prompt, tokens so far) -> whether the rest is of no interest; asked every
    AT_ONCE tokens, so that up to AT_ONCE - 1 come after the end. Nothing is cached between tokens:
    each costs a pass over its row. What follows a NOT_FINITE is arbitrary.
    Errors: ConfigError for an empty prompt, or a limit that leaves no room to one token of it."""
    for prompt, limit in zip(prompts, limits, strict=True):
      if not prompt or not 0 < limit < self.context:
        raise ConfigError(
          f"context = {self.context}: a window of that holds no {limit} new tokens after "
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
    return max(1, self._batch_tokens // length) * self._ways

  def _length(self, tokens: int) -> int:
    """The bucket: a power of two, or three quarters of one, and at most the context."""
    above = max(next_power_of_two(tokens), SHORTEST)
    return min(above * 3 // 4 if tokens <= above * 3 // 4 else above, self.context)


def next_power_of_two(n: int) -> int:
  """The smallest power of two that is at least n."""
  return 1 << (n - 1).bit_length()


def score(model, params, tokens_RxL, positions_RxS, targets_RxS, *, columns):
  """Negative log-likelihood of every target in nats, and whether it is the argmax, [R, S] each.

  float32 at least. Only the scored positions go through the head, `columns` of each row at once."""
  R, S = targets_RxS.shape
  x_RxLxD = model.apply({"params": params}, tokens_RxL, method="hidden")
  x_RxSxD = jnp.take_along_axis(x_RxLxD, positions_RxS[..., None], axis=1)

  def predict(x_RxCxD, targets_RxC):
    logits_RxCxV = model.apply({"params": params}, x_RxCxD, method="logits")
    nll = loss.cross_entropy(
      logits_RxCxV.reshape(-1, logits_RxCxV.shape[-1]), targets_RxC.reshape(-1)
    )
    return nll.reshape(targets_RxC.shape), jnp.argmax(logits_RxCxV, axis=-1) == targets_RxC

  # The power of two from below, which divides S: that is one too.
  C = min(S, next_power_of_two(columns + 1) // 2)
  if C == S:
    return predict(x_RxSxD, targets_RxS)
  chunks = (
    jnp.moveaxis(x.reshape(R, S // C, C, *x.shape[2:]), 1, 0) for x in (x_RxSxD, targets_RxS)
  )
  nll, first = jax.lax.map(lambda chunk: predict(*chunk), tuple(chunks))
  return (jnp.moveaxis(nll, 0, 1).reshape(R, S), jnp.moveaxis(first, 0, 1).reshape(R, S))


def extend(model, known_V, params, tokens_RxL, lengths_R):
  """The AT_ONCE tokens that follow greedily after the first lengths_R of each row, [R, AT_ONCE].

  known_V: which ids may follow. Those that would come after position L are arbitrary."""
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
