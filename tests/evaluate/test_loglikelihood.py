"""Scores of token sequences against the plain forward pass, whatever the batches, buckets and
devices."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers import config, mesh
from beyond_outliers.evaluate import loglikelihood
from beyond_outliers.model import hf, hf_config, transformer

CONTEXT = 24


def olmo2(**changes):
  """An OLMo2 whose every number is drawn."""
  c = config.Model(
    **{
      "vocab": 64,
      "blocks": 2,
      "heads": 4,
      "kv_heads": 2,
      "d_head": 4,
      "d_model": 16,
      "mlp_hidden": 32,
      "norm_eps": 1e-6,
      "rope_base": 500000.0,
      "tied": False,
      "init_std": 0.02,
      "dtype": "float32",
      "attention": "blockwise",
      "unroll": 1,
      "remat": "none",
      **hf_config.FAMILIES["olmo2"].switches,
      **changes,
    }
  )
  model, draw = transformer.Transformer(c), np.random.default_rng(0)
  return model, jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0.5, 0.5, leaf.shape), jnp.float32),
    transformer.shapes(model),
  )


@pytest.fixture(scope="module")
def pairs():
  """Contexts and continuations of 1 to 40 and 1 to CONTEXT tokens: many lose their beginning."""
  draw = np.random.default_rng(1)
  return [
    loglikelihood.Pair(
      draw.integers(0, 64, draw.integers(1, 41)).tolist(),
      draw.integers(0, 64, draw.choice([1, 1, 2, 5, 9, CONTEXT])).tolist(),
    )
    for _ in range(60)
  ]


@pytest.fixture(scope="module")
def directly():
  """(model, params, pair) -> the score by one pass over the pair alone, and a log-softmax in
  float64."""
  forward = jax.jit(transformer.Transformer.apply, static_argnums=0)

  def score(model, params, pair):
    window = [*pair.context, *pair.continuation][-(CONTEXT + 1) :]
    # Other tokens follow the scored ones, so that one compiled length serves all.
    tokens = np.full((1, CONTEXT), 7)
    tokens[0, : len(window) - 1] = window[:-1]
    logits_LxV = np.asarray(forward(model, {"params": params}, tokens)[0], np.float64)
    logits_LxV -= logits_LxV.max(1, keepdims=True)
    log_p_LxV = logits_LxV - np.log(np.exp(logits_LxV).sum(1, keepdims=True))
    places = np.arange(len(window) - 1 - len(pair.continuation), len(window) - 1)
    return log_p_LxV[places, pair.continuation].sum(), (
      log_p_LxV[places].argmax(1) == pair.continuation
    ).all()

  return score


def assert_close(got, expected):
  np.testing.assert_allclose(
    [score for score, _ in got], [score for score, _ in expected], rtol=2e-6, atol=2e-5
  )
  assert [first for _, first in got] == [first for _, first in expected]


def test_scores_of_a_hugging_face_directory_are_those_of_the_plain_pass(pairs, directly, tmp_path):
  hf.save(*olmo2(), tmp_path / "olmo2")
  model, params = hf.load(tmp_path / "olmo2")
  # Some continuations that the model would choose itself.
  scorer = loglikelihood.Scorer(model, params, context=CONTEXT)
  chosen = scorer.generate([context for context, _ in pairs[:5]], [4] * 5, lambda *_: False)
  asked = [
    *pairs,
    *(
      loglikelihood.Pair(context[-20:], ids)
      for (context, _), ids in zip(pairs, chosen, strict=False)
    ),
  ]
  got = scorer.score(asked)
  assert_close(got, [directly(model, params, pair) for pair in asked])
  assert 5 <= sum(first for _, first in got) < len(asked)


@pytest.mark.slow
def test_scores_do_not_depend_on_batches_order_or_devices(pairs):
  model, params = olmo2()
  expected = loglikelihood.Scorer(model, params, context=CONTEXT).score(pairs)
  # So small that a batch has two rows and the head sees few columns at once.
  assert_close(
    loglikelihood.Scorer(model, params, context=CONTEXT, batch_tokens=48).score(pairs), expected
  )
  order = np.random.default_rng(2).permutation(len(pairs))
  shuffled = loglikelihood.Scorer(model, params, context=CONTEXT).score([pairs[i] for i in order])
  assert_close(shuffled, [expected[i] for i in order])
  eight = mesh.make_mesh(config.Mesh(data=2, fsdp=2, model=2))
  placed = jax.device_put(params, mesh.shardings(transformer.boxed_shapes(model), eight))
  assert_close(
    loglikelihood.Scorer(model, placed, context=CONTEXT, mesh=eight, batch_tokens=48).score(pairs),
    expected,
  )


def test_choices_are_scored_as_if_alone_by_one_program(directly):
  """Some are asked twice; after one token all is NaN."""
  model, params = olmo2()
  params["embedding"] = params["embedding"].at[63].set(jnp.nan)
  draw, asked = np.random.default_rng(3), []
  for _ in range(20):
    context = draw.integers(0, 63, draw.integers(1, 12)).tolist()
    choices = [draw.integers(0, 63, n).tolist() for n in draw.integers(1, 12, draw.integers(1, 5))]
    asked += [loglikelihood.Pair(context, choice) for choice in [*choices, choices[0]]]
  broken = loglikelihood.Pair([1, 63, 2], [3])
  scorer, given = loglikelihood.Scorer(model, params, context=CONTEXT, batch_tokens=512), []
  scorer._run = lambda program, *arrays, run=scorer._run: (
    given.append(arrays),
    run(program, *arrays),
  )[1]
  got = scorer.score(asked)
  assert_close(got, [directly(model, params, pair) for pair in asked])
  assert scorer._score._cache_size() == 1
  tokens, unique = sum(tokens.size for tokens, *_ in given), {(*a, 99, *b) for a, b in asked}
  assert tokens < sum(map(len, unique))
  assert sum((sources >= 0).sum() for *_, sources, _ in given) == sum(
    len(key) - key.index(99) - 1 for key in unique
  )
  (nan, first), *others = scorer.score([broken, *asked])
  assert np.isnan(nan) and not first
  assert_close(others, got)


def test_few_programs_and_no_logits_that_nobody_asked_for():
  model, params = olmo2()
  scorer = loglikelihood.Scorer(model, params, context=2048)
  assert {scorer._row_length(n) for n in range(1, 2049)} == {256, 512, 1024, 2048}
  # 4 rows of 32 tokens; 2 of 32 positions go through the head at once, if they are asked for.
  jaxpr = jax.make_jaxpr(lambda *arrays: loglikelihood.score(model, params, *arrays))(
    *(np.zeros((4, 32, *rest), int) for rest in ((), (), (2,), (), ()))
  )
  wide = {
    variable.aval.size for variable in _outputs(jaxpr.jaxpr) if variable.aval.shape[-1:] == (64,)
  }
  assert max(wide) == 4 * 2 * 64


def _outputs(jaxpr):
  for equation in jaxpr.eqns:
    yield from equation.outvars
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _outputs(inner)


@pytest.mark.parametrize("batch_tokens", [48, 8192])
def test_greedy_continuations_are_those_of_one_token_at_a_time(batch_tokens):
  model, params = olmo2()
  draw = np.random.default_rng(4)
  prompts = [draw.integers(0, 64, n).tolist() for n in (1, 3, 6, 40)]
  limits = [20, 7, 1, 5]
  forward = jax.jit(model.apply)
  expected = []
  for prompt, limit in zip(prompts, limits, strict=True):
    ids = prompt[-(CONTEXT - limit) :]
    start = len(ids)
    for _ in range(limit):
      padded = np.array([ids + [0] * (CONTEXT - len(ids))])
      ids.append(int(np.argmax(forward({"params": params}, padded)[0, len(ids) - 1])))
    expected.append(ids[start:])
  scorer = loglikelihood.Scorer(model, params, context=CONTEXT, batch_tokens=batch_tokens)
  assert scorer.generate(prompts, limits, lambda number, ids: False) == expected
  # Rows that ended keep what they have, the others go on.
  got = scorer.generate(prompts, limits, lambda number, ids: number == 0)
  assert got == [expected[0][: loglikelihood.AT_ONCE], *expected[1:]]


def test_greedy_continuations_are_made_of_the_given_ids_and_probabilities_of_all():
  """As with a vocabulary padded beyond the tokenizer's, or a tokenizer's that has gaps."""
  model, params = olmo2()
  ids, prompt = [3, 5, 8, 13, 21, 34, 55], [1, 2]
  scorer = loglikelihood.Scorer(model, params, context=CONTEXT, ids=ids)
  (got,) = scorer.generate([prompt], [6], lambda *_: False)
  logits = jax.jit(model.apply)({"params": params}, np.array([prompt + got + [0] * 16]))[0]
  assert got == [ids[int(np.argmax(logits[place, ids]))] for place in range(1, 7)]
  (whole,) = loglikelihood.Scorer(model, params, context=CONTEXT).score(
    [loglikelihood.Pair(prompt, got)]
  )
  assert scorer.score([loglikelihood.Pair(prompt, got)])[0][0] == whole[0]


def test_logits_that_are_not_finite_end_their_row_alone():
  model, params = olmo2()
  params["embedding"] = params["embedding"].at[7].set(jnp.nan)
  scorer = loglikelihood.Scorer(model, params, context=CONTEXT)
  broken, whole = scorer.generate([[7, 1], [1, 2]], [20, 20], lambda *_: False)
  assert broken[0] == loglikelihood.NOT_FINITE
  if 7 not in whole:
    assert loglikelihood.NOT_FINITE not in whole and len(whole) == 20


@pytest.mark.parametrize(
  ("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * (CONTEXT + 1))]
)
def test_what_cannot_be_scored_is_refused(context, continuation):
  with pytest.raises(config.ConfigError, match=r"context = 24: .* to score"):
    loglikelihood.Scorer(*olmo2(), context=CONTEXT).score(
      [loglikelihood.Pair(context, continuation)]
    )


@pytest.mark.parametrize("limit", [0, CONTEXT])
def test_a_limit_without_room_is_refused(limit):
  with pytest.raises(config.ConfigError, match=r"context = 24: .* new tokens"):
    loglikelihood.Scorer(*olmo2(), context=CONTEXT).generate([[1]], [limit], lambda *_: False)
