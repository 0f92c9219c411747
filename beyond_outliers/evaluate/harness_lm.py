"""A model as the lm-evaluation-harness's `LM`: answers its questions, which are strings, by a
`loglikelihood.Scorer`.

Needs the extra `eval`, and no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import lm_eval.api.model
import lm_eval.models.utils
import lm_eval.utils

from beyond_outliers.config import checks
from beyond_outliers.data import tokenizers
from beyond_outliers.errors import ConfigError
from beyond_outliers.evaluate import loglikelihood
from beyond_outliers.evaluate.loglikelihood import NOT_FINITE, Pair
from beyond_outliers.types import LanguageModel, Params

# A task, and the number of its document, from 0; None for a request that belongs to no task.
Example = tuple[str | None, int | None]

GENERATED = 256  # most tokens where a task sets no limit, but no more than half the window


class HarnessModel(lm_eval.api.model.TemplateLM):
  """Answers the harness's questions, which are strings, by a `loglikelihood.Scorer`.

  prefix: the id put before a text without a context, as between documents in training. bos: whether
  it is put before every text, as before every document in training; it is not doubled. As with the
  harness's Hugging Face model, contexts too long for the window lose their beginning, and a
  context's trailing spaces are encoded with the continuation. Generation is greedy, and stops where
  the text ends or another would begin; control tokens are dropped from it.

  What the harness's model fails on has no score here, and `left_out` says why: a continuation with
  no tokens, because it is empty or merges with its context, or with more than the window holds; and
  values that are not finite.
  Errors: ConfigError for a task that samples, or asks for more tokens than the window holds."""

  def __init__(
    self,
    scorer: loglikelihood.Scorer,
    tokenizer: tokenizers.Tokenizer,
    prefix: int,
    bos: bool = False,
  ):
    super().__init__()
    self._scorer, self._tokenizer, self._prefix, self._bos = scorer, tokenizer, prefix, bos
    self._control_ids = {i for i in (tokenizer.eot, tokenizer.bos) if i is not None}
    self._control_ids |= set(tokenizer.special.values())
    self.left_out: dict[Example, str] = {}  # -> why; since the last `forget`
    self.truncated: set[Example] = set()  # examples whose context lost its beginning

  @property
  def eot_token_id(self):
    return self._prefix if self._tokenizer.eot is None else self._tokenizer.eot

  @property
  def prefix_token_id(self):
    return self._prefix

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    ids = self._tokenizer.encode(string).tolist()
    begins = self._bos and add_special_tokens is not False and ids[:1] != [self._prefix]
    return [self._prefix, *ids] if begins else ids

  def forget(self) -> None:
    self.left_out, self.truncated = {}, set()

  def loglikelihood(self, requests, disable_tqdm=True):
    texts = [request.args[:2] for request in requests]
    pairs = [self._pair(*each) for each in texts]
    results = self._loglikelihood_tokens(
      [(each, *pair) for each, pair in zip(texts, pairs, strict=True)]
    )
    for request, pair, (score, _) in zip(requests, pairs, results, strict=True):
      self._note(request, sum(map(len, pair)) - 1, self._unscorable(pair) or not_finite(score))
    return results

  def _pair(self, context: str, continuation: str) -> Pair:
    if context:
      before, after = self._encode_pair(context, continuation)
      return Pair(before or [self._prefix], after)
    ids = self.tok_encode(continuation, add_special_tokens=False)
    return Pair(ids[:1], ids[1:]) if ids[:1] == [self._prefix] else Pair([self._prefix], ids)

  def _unscorable(self, pair: Pair) -> str:
    """Why a pair has no score; empty if it has one."""
    if not pair.continuation:
      return "a continuation has no tokens: it is empty, or merges with its context"
    tokens, window = len(pair.continuation), self._scorer.context
    return f"a continuation has {tokens} tokens, the window {window}" if tokens > window else ""

  def _loglikelihood_tokens(self, requests, **kwargs):
    pairs = [Pair(context, continuation) for _, context, continuation in requests]
    scores = iter(self._scorer.score([pair for pair in pairs if not self._unscorable(pair)]))
    results = [(math.nan, False) if self._unscorable(pair) else next(scores) for pair in pairs]
    return self._cached("loglikelihood", [texts for texts, _, _ in requests], results)

  def _note(self, request: Any, tokens: int, reason: str) -> None:
    """Notes a request's example as left out if there is a reason, or as truncated by its tokens."""
    example = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    if reason:
      self.left_out.setdefault(example, reason)
    elif tokens > self._scorer.context:
      self.truncated.add(example)

  def loglikelihood_rolling(self, requests, disable_tqdm=True):
    # No prefix here: it is put before each window.
    texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
    windows = [
      [
        Pair(*lm_eval.utils.make_disjoint_window(window))
        for window in lm_eval.utils.get_rolling_token_windows(
          text, self._prefix, self._scorer.context, context_len=1
        )
      ]
      for text in texts
    ]
    scores = iter(self._scorer.score([window for each in windows for window in each]))
    results = [sum(next(scores)[0] for _ in each) for each in windows]
    for request, score in zip(requests, results, strict=True):
      self._note(request, 0, not_finite(score))
    return self._cached("loglikelihood_rolling", [request.args for request in requests], results)

  def generate_until(self, requests, disable_tqdm=True):
    settings = [self._generation_settings(request.args[1]) for request in requests]
    prompts = [self.tok_encode(request.args[0]) or [self._prefix] for request in requests]
    limits = [setting["max_gen_toks"] for setting in settings]
    stops = [setting["until"] for setting in settings]
    ends = [self._ends(each) for each in stops]

    def ended(number, ids):
      whole = self._tokenizer.decode(ids)
      return not ends[number].isdisjoint(ids) or cut(whole, stops[number]) != whole

    generated = self._scorer.generate(prompts, limits, ended)
    results = []
    for number, (request, ids) in enumerate(zip(requests, generated, strict=True)):
      ids = until(ids, ends[number])
      broken = "the logits of a token are not finite" if NOT_FINITE in ids else ""
      self._note(request, len(prompts[number]) + limits[number], broken)
      text = [i for i in ids if i not in self._control_ids]
      results.append("" if broken else cut(self._tokenizer.decode(text), stops[number]))
    return self._cached("generate_until", [request.args for request in requests], results)

  def _ends(self, stops: Sequence[str]) -> set[int | None]:
    """The ids that end a text, including special tokens whose names are among the stops."""
    spelled = {i for name, i in self._tokenizer.special.items() if name in stops}
    return {self.eot_token_id, self._prefix, self._tokenizer.bos} | spelled

  def _generation_settings(self, settings):
    window = self._scorer.context
    try:
      whole = lm_eval.models.utils.normalize_gen_kwargs(settings, min(GENERATED, window // 2))
    except (TypeError, ValueError) as error:
      raise ConfigError(f"generation_kwargs = {settings!r}: {error}; fix the task's file") from None
    field, limit = "generation_kwargs.max_gen_toks", whole["max_gen_toks"]
    remedy = f"expected 1 to {window - 1}, one below the window"
    checks.require(0 < limit < window, field, limit, remedy)
    field, remedy = "generation_kwargs.do_sample", "only greedy generation works; set it to false"
    checks.require(not whole["do_sample"], field, True, remedy)
    whole["until"] = [stop for stop in whole["until"] if stop]  # null and "" stop nothing
    field, remedy = "generation_kwargs.until", "expected texts at which generation ends"
    checks.require(all(isinstance(s, str) for s in whole["until"]), field, whole["until"], remedy)
    return whole

  def _cached(self, method, keys, results):
    for key, result in zip(keys, results, strict=True):
      self.cache_hook.add_partial(method, key, result)
    return results


def not_finite(score: float) -> str:
  """Why a log-likelihood cannot serve as a score; empty if it can."""
  return "" if math.isfinite(score) else f"a log-likelihood is {score}"


def until(ids: Sequence[int], ends: set[int | None]) -> list[int]:
  """The ids before the first that is in `ends`."""
  return list(itertools.takewhile(lambda i: i not in ends, ids))


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first stop string."""
  ends = [text.find(stop) for stop in stops if stop in text]
  return text[: min(ends, default=len(text))]


def harness_model(
  model: LanguageModel,
  params: Params,
  tokenizer: tokenizers.Tokenizer,
  *,
  context: int,
  mesh: jax.sharding.Mesh | None = None,
  prefix: int | None = None,
  bos: bool = False,
) -> HarnessModel:
  """A model to ask any number of tasks; its programs are compiled once for all of them.

  context, mesh: see `loglikelihood.Scorer`. prefix, bos: see `HarnessModel`; prefix is by default
  the tokenizer's token that ends a text (with bos: begins it), or else the other."""
  marks = (tokenizer.bos, tokenizer.eot) if bos else (tokenizer.eot, tokenizer.bos)
  prefix = next((i for i in (prefix, *marks) if i is not None), None)
  if prefix is None:
    raise ConfigError(
      "prefix = None: the tokenizer has no token that ends or begins a text; name one"
    )
  # The model's vocabulary may be padded beyond the tokenizer's.
  scorer = loglikelihood.Scorer(model, params, context=context, mesh=mesh, ids=tokenizer.ids)
  return HarnessModel(scorer, tokenizer, prefix, bos)
