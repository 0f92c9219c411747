"""The train step: the definition of the loss, parts of a batch add up to the whole, and what a
non-finite step leaves unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config
from beyond_outliers.evaluate import steps
from beyond_outliers.model import loss, transformer
from beyond_outliers.model.forward import make_forward
from beyond_outliers.train import step
from configs import adamw

TINY = "nano,model.blocks=1,model.d_head=4,data.vocab=32,context=12,batch_size=8"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
  return transformer.Transformer(config.resolve(adamw.get_config(TINY)).model)


@pytest.fixture(scope="module")
def params(model):
  # Larger than at initialisation: there all logits are nearly equal and a wrong loss looks right.
  return jax.jit(
    lambda: jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, transformer.init(model, 0))
  )()


@pytest.fixture(scope="module")
def losses(model):
  """losses(mask_documents)(params, batch) -> [B, L]"""
  return {
    mask: jax.jit(lambda p, b, mask=mask: loss.token_losses(make_forward(model, mask), p, b))
    for mask in (True, False)
  }


def make_batch(rows: int = 8, seed: int = 0, weighted: bool = True):
  """Two documents a row; a third of the targets weigh nothing, and rows 1 and 5 nothing at all."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 32, (rows, 13), dtype=np.int32)
  segment_ids = np.repeat(np.array([[1] * 7 + [2] * 5], np.int32), rows, 0)
  positions = np.repeat(np.array([[*range(7), *range(5)]], np.int32), rows, 0)
  weights = (
    (rng.random((rows, 12)) > 1 / 3).astype(np.float32)
    if weighted
    else np.ones((rows, 12), np.float32)
  )
  if weighted:
    weights[1::4] = 0
  return jax.tree.map(
    jnp.asarray,
    {
      "tokens": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "segment_ids": segment_ids,
      "positions": positions,
      "weights": weights,
    },
  )


def assert_same_bits(one, other):
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_loss_is_the_weighted_mean_of_minus_log_p(model, params):
  batch = make_batch()
  logits = np.asarray(
    jax.jit(lambda p, tokens: model.apply({"params": p}, tokens))(params, batch["tokens"]),
    np.float64,
  )
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], -1)[..., 0]
  weights = np.asarray(batch["weights"])
  assert nll.std() > 0.3, "too even to tell one target from another"

  value, aux = jax.jit(step.make_loss_fn(make_forward(model, False)))(params, batch, KEY)
  np.testing.assert_allclose(value, (nll * weights).sum() / weights.sum(), rtol=1e-5)
  assert aux["weight"] == weights.sum()

  eval_step = jax.jit(steps.make_eval_step(make_forward(model, False)))
  got, documents = eval_step(params, batch)
  np.testing.assert_allclose(got, nll * (weights > 0), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(documents, batch["segment_ids"] * (weights > 0))
  # What has no weight is left out even where its loss is not a number.
  sick = params | {"embedding": params["embedding"] * jnp.nan}
  assert np.array_equal(np.isnan(eval_step(sick, batch)[0]), weights > 0)


def test_parts_of_a_batch_add_up_to_the_whole(model, params):
  """Loss, gradient norm and updated parameters, though the parts weigh unequally and one of four
  weighs nothing."""
  tx, batch = optax.sgd(0.5), make_batch()
  parts = np.asarray(batch["weights"]).reshape(-1, 4, 12).sum((0, 2))
  assert parts[1] == 0 and len(set(parts.tolist())) == 4
  after = {}
  for micro_batches in (1, 4):
    train_step = jax.jit(
      step.make_train_step(
        step.make_loss_fn(make_forward(model, False)), tx, {}, seed=0, micro_batches=micro_batches
      )
    )
    after[micro_batches] = train_step(step.init_state(params, tx), batch)
    state, metrics = after[micro_batches]
    for name in ("train/loss", "gradient_norm"):
      np.testing.assert_allclose(metrics[name], after[1][1][name], rtol=1e-5)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      state.params,
      after[1][0].params,
    )
  assert (
    max(
      float(abs(x - y).max())
      for x, y in zip(*map(jax.tree.leaves, (state.params, params)), strict=True)
    )
    > 1e-3
  )


def test_each_part_draws_its_own_numbers():
  def draws(p, batch, rng):
    weight = jnp.sum(batch["weights"])
    return p * weight * jax.random.normal(rng), {"weight": weight}

  (_, _), two = step.accumulate(draws, 2)(jnp.ones(()), {"weights": jnp.ones((2, 1))}, KEY)
  expected = np.mean([jax.random.normal(jax.random.fold_in(KEY, part)) for part in range(2)])
  np.testing.assert_allclose(two, expected, rtol=1e-6)


# A stand-in for a model: the batch holds a factor of the loss, something added to it that no
# gradient sees, and whether the gradient alone is not finite.
def toy_loss(params, batch, rng):
  del rng
  # The root of something that is always 1, or always 0, where its slope is infinite.
  zero = params["w"] - jax.lax.stop_gradient(params["w"])
  value = jnp.sum(params["w"] ** 2) * batch["factor"] + jnp.sum(jnp.sqrt(zero + 1 - batch["sick"]))
  return value + batch["added"], {"weight": jnp.ones(())}


GOOD = {"factor": 1.0, "added": 0.0, "sick": 0.0}
NAN, INF, HUGE = GOOD | {"factor": np.nan}, GOOD | {"factor": np.inf}, GOOD | {"factor": 1e38}
SICK_LOSS, SICK_GRADIENT = GOOD | {"added": np.nan}, GOOD | {"sick": 1.0}


def toy_start(tx, **options):
  state = step.init_state({"w": jnp.array([1.0, -2.0, 3.0])}, tx)
  return jax.jit(step.make_train_step(toy_loss, tx, {}, seed=0, **options)), state


def batch_of(kind):
  return {name: jnp.float32(value) for name, value in kind.items()}


@pytest.mark.parametrize(
  "bad, finite_loss",
  [(NAN, False), (INF, False), (HUGE, False), (SICK_LOSS, False), (SICK_GRADIENT, True)],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad, finite_loss):
  train_step, state = toy_start(optax.adamw(0.1))
  state, metrics = train_step(state, batch_of(GOOD))
  assert np.isfinite(float(metrics["gradient_norm"])) and metrics["skipped"] == 0
  before = state
  state, metrics = train_step(state, batch_of(bad))
  assert np.isfinite(float(metrics["train/loss"])) == finite_loss
  assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (2, 1, 1)
  state, _ = train_step(state, batch_of(GOOD))
  assert np.all(np.asarray(state.params["w"]) != np.asarray(before.params["w"])), (
    "a good step afterwards trains again"
  )


@pytest.mark.parametrize("sick", ["a step that overflows", "a moment that is not a number"])
def test_an_update_that_is_not_finite_changes_nothing_though_loss_and_gradient_are(sick):
  rates = jnp.array([0.1, jnp.inf, 0.1])
  tx = optax.adam(lambda count: rates[count] if sick == "a step that overflows" else 0.1)
  train_step, state = toy_start(tx)
  state, _ = train_step(state, batch_of(GOOD))
  if sick == "a moment that is not a number":
    moments = state.opt_state[0]
    mu = {"w": moments.mu["w"].at[1].set(jnp.nan)}
    state = state._replace(opt_state=(moments._replace(mu=mu), *state.opt_state[1:]))
  before = state
  state, metrics = train_step(state, batch_of(GOOD))
  assert np.isfinite([float(metrics["train/loss"]), float(metrics["gradient_norm"])]).all()
  assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (2, 1, 1)


def test_skipped_updates_are_counted_and_a_good_one_ends_the_row():
  train_step, state = toy_start(optax.adamw(0.1))
  counts = []
  for kind in (GOOD, NAN, INF, GOOD, SICK_GRADIENT, GOOD):
    state, metrics = train_step(state, batch_of(kind))
    counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
  assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
  assert int(state.step) == 6


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_the_moving_average_is_a_weighted_mean_of_the_parameters(decay):
  """Of those that updates led to, the i-th of n with a weight proportional to decay^(n - i), by a
  loop in NumPy; a skipped update moves nothing. The state is donated, as a run's is."""
  tx = optax.sgd(0.25)
  make = step.make_train_step(toy_loss, tx, {}, seed=0, average_decay=decay)
  train_step = jax.jit(make, donate_argnums=0)
  start = jnp.array([1.0, -2.0, 3.0])
  state = jax.jit(lambda: step.init_state({"w": start}, tx, averaged=True))()
  np.testing.assert_array_equal(state.average["w"], start)
  after: list[np.ndarray] = []
  for kind in (
    NAN,
    GOOD,
    GOOD | {"factor": -0.5},
    NAN,
    SICK_GRADIENT,
    GOOD,
    GOOD | {"factor": 2.0},
  ):
    state, metrics = train_step(state, batch_of(kind))
    if not metrics["skipped_in_a_row"]:
      after.append(np.asarray(state.params["w"], np.float64))
    weights = decay ** np.arange(len(after))[::-1]
    expected = np.average(after, 0, weights) if after else start
    np.testing.assert_allclose(state.average["w"], expected, rtol=2e-6)
  assert len(after) == 4 and np.std(after, 0).min() > 0.1


def test_without_an_average_the_state_has_no_arrays_for_it():
  _, state = toy_start(optax.adamw(0.1))
  assert state.average is None
  averaged = step.init_state({"w": jnp.ones(3)}, optax.sgd(0.1), averaged=True)
  assert len(jax.tree.leaves(averaged)) == 3 + 2


def test_the_gradient_norm_is_right():
  train_step, state = toy_start(optax.sgd(0.25))
  before = np.asarray(state.params["w"])
  state, metrics = train_step(state, batch_of(GOOD))
  np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(2 * before + 0.5), rtol=1e-6)


def test_one_trace_serves_all_steps_and_state_keeps_its_types():
  traces = []

  def counted(*args):
    traces.append(1)
    return toy_loss(*args)

  tx = optax.adamw(0.1)
  train_step = jax.jit(step.make_train_step(counted, tx, {}, seed=0))
  state = step.init_state({"w": jnp.ones(3)}, tx)
  start = jax.tree.map(jax.typeof, state)
  for kind in (GOOD, NAN, GOOD, GOOD):
    state, metrics = train_step(state, batch_of(kind))
  assert len(traces) == 1
  assert jax.tree.map(jax.typeof, state) == start
  assert set(metrics) == {"train/loss", "gradient_norm", "skipped", "skipped_in_a_row"}


def test_randomness_is_a_function_of_seed_and_step_alone():
  def noise(params, batch, rng):
    return jnp.sum(params["w"]) + jax.random.normal(rng), {"weight": jnp.ones(())}

  tx = optax.sgd(0.0)
  state = step.init_state({"w": jnp.zeros(3)}, tx)
  losses = {}
  for seed in (0, 1):
    train_step = jax.jit(step.make_train_step(noise, tx, {}, seed=seed))
    for number in (0, 1, 0):
      _, metrics = train_step(state._replace(step=jnp.int32(number)), {})
      assert losses.setdefault((seed, number), float(metrics["train/loss"])) == float(
        metrics["train/loss"]
      )
  assert len(set(losses.values())) == 4


def test_documents_are_masked_only_when_asked_for(losses, params):
  batch = make_batch(weighted=False)
  other_first_document = batch | {"tokens": batch["tokens"].at[:, :7].add(1) % 32}
  one_document = batch | {
    "segment_ids": jnp.ones((8, 12), jnp.int32),
    "positions": jnp.tile(jnp.arange(12), (8, 1)),
  }
  on, off = (losses[mask](params, batch) for mask in (True, False))

  # On: the second document neither sees the first, nor knows how far in it stands.
  np.testing.assert_allclose(
    on[:, 7:], losses[True](params, other_first_document)[:, 7:], rtol=1e-5
  )
  alone = losses[False](params, jax.tree.map(lambda x: x[:, 7:], batch))
  np.testing.assert_allclose(on[:, 7:], alone, rtol=1e-4, atol=1e-5)
  # Rotary embedding sees distances only, so a shift of the positions would not show; a stretch
  # does.
  assert abs(on - losses[True](params, batch | {"positions": 3 * batch["positions"]})).max() > 1e-2
  # Off: plain causal text, whatever the segments say.
  np.testing.assert_array_equal(off, losses[False](params, one_document))
  np.testing.assert_allclose(off, losses[True](params, one_document), rtol=1e-4, atol=1e-5)
  assert abs(off - losses[False](params, other_first_document))[:, 7:].max() > 1e-2
  assert abs(off - on)[:, 7:].max() > 1e-2


@pytest.mark.parametrize("mask_documents", [True, False])
def test_the_switch_reaches_training_and_evaluation(model, losses, params, mask_documents):
  batch = make_batch()
  weights = batch["weights"]
  value, _ = jax.jit(step.make_loss_fn(make_forward(model, mask_documents)))(params, batch, KEY)
  expected = losses[mask_documents](params, batch) * weights
  np.testing.assert_allclose(value, expected.sum() / weights.sum(), rtol=1e-5)
  got, _ = jax.jit(steps.make_eval_step(make_forward(model, mask_documents)))(params, batch)
  np.testing.assert_allclose(
    got, losses[mask_documents](params, batch) * (weights > 0), rtol=1e-4, atol=1e-5
  )


def test_the_pair_step_compares_two_models_token_by_token(model, params):
  """Against NumPy on both models' logits; what weighs nothing counts for no document and is
  zero."""
  batch, other = (
    make_batch(),
    jax.tree.map(lambda x: x + 0.03 * jax.random.normal(KEY, x.shape), params),
  )
  forward = make_forward(model, True)
  pair_step = jax.jit(steps.make_pair_step(forward, forward))
  numbers, document = pair_step(params, other, batch)
  apply = jax.jit(
    lambda p: model.apply({"params": p}, batch["tokens"], batch["segment_ids"], batch["positions"])
  )
  logits = [np.asarray(apply(p), np.float64) for p in (params, other)]
  log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)

  def pick(log):
    return -np.take_along_axis(log, np.asarray(batch["targets"])[..., None], -1)[..., 0]

  expected = {
    "reference_nll": pick(log_p),
    "nll": pick(log_q),
    "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
    "agreement": log_p.argmax(-1) == log_q.argmax(-1),
  }
  counts = np.asarray(batch["weights"]) > 0
  assert 0.1 < expected["agreement"].mean() < 0.9 and expected["kl"].mean() > 0.01
  assert numbers.keys() == expected.keys()
  for name, want in expected.items():
    np.testing.assert_allclose(
      numbers[name], np.where(counts, want, 0), rtol=1e-4, atol=1e-5, err_msg=name
    )
  np.testing.assert_array_equal(document, np.where(counts, batch["segment_ids"], 0))
  # Of two broken models the likeliest token is the first of all that are NaN.
  sick = params | {"embedding": params["embedding"] * jnp.nan}
  assert np.array_equal(np.isnan(pair_step(sick, sick, batch)[0]["agreement"]), counts)
