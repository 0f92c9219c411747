"""Cross entropy against float64 NumPy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beyond_outliers import quant
from beyond_outliers.model import loss, transformer
from beyond_outliers.ops import linear_cross_entropy

T, V = 16, 64


def problem():
  draw = np.random.default_rng(0)
  return (
    draw.standard_normal((T, V)) * 5,
    draw.integers(0, V, T).astype(np.int32),
    draw.standard_normal(T),
  )


def naive(logits, targets, g):
  """(nll, dlogits) of sum(nll * g)."""
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return -np.log(p[np.arange(T), targets]), g[:, None] * (p - np.eye(V)[targets])


def forward_and_gradient(logits, targets, g):
  nll, pullback = jax.vjp(lambda logits: loss.cross_entropy(logits, targets), logits)
  return nll, *pullback(g.astype(nll.dtype))


@pytest.mark.parametrize(
  "dtype,wide,tolerance",
  [("float64", "float64", 1e-12), ("float32", "float32", 3e-6), ("bfloat16", "float32", 8e-3)],
)
def test_equals_numpy(dtype, wide, tolerance):
  logits, targets, g = problem()
  with jax.enable_x64(dtype == "float64"):
    logits = jnp.asarray(logits, dtype)
    nll, dlogits = jax.jit(forward_and_gradient)(logits, targets, g)
  expected_nll, expected_dlogits = naive(np.asarray(logits, np.float64), targets, g)
  assert nll.dtype == wide and dlogits.dtype == dtype
  np.testing.assert_allclose(
    nll, expected_nll, rtol=min(tolerance, 3e-6), atol=min(tolerance, 3e-6)
  )
  np.testing.assert_allclose(
    np.asarray(dlogits, np.float64), expected_dlogits, rtol=tolerance, atol=tolerance
  )


def test_large_logits_stay_finite():
  nll, dlogits = forward_and_gradient(
    jnp.array([[1e4, -1e4], [1e4, -1e4]]), jnp.array([0, 1]), jnp.ones(2)
  )
  np.testing.assert_allclose(nll, [0, 2e4])
  np.testing.assert_allclose(dlogits, [[0, 0], [1, -1]])


def test_sharded_vocabulary_agrees_with_one_device_and_is_not_gathered():
  logits, targets, g = problem()
  logits, g = jnp.asarray(logits, jnp.float32), jnp.asarray(g, jnp.float32)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
  rows, table = (
    NamedSharding(mesh, P(("data", "fsdp"))),
    NamedSharding(mesh, P(("data", "fsdp"), "model")),
  )
  sharded = jax.jit(
    forward_and_gradient, in_shardings=(table, rows, rows), out_shardings=(rows, table)
  )
  eight = sharded.lower(logits, targets, g).compile()
  spread = jax.device_put((logits, targets, g), (table, rows, rows))
  for a, b in zip(eight(*spread), forward_and_gradient(logits, targets, g), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  gathered = [line for line in eight.as_text().splitlines() if re.search(rf"f32\[\d+,{V}\]", line)]
  assert not gathered, gathered


def test_the_divergence_is_that_of_numpy_and_nothing_where_both_agree():
  p, *_ = problem()
  p[0] += 500  # far from zero, as logits may be
  q = p + np.random.default_rng(1).standard_normal(p.shape) * np.geomspace(1e-2, 3, T)[:, None]
  log = [x - x.max(-1, keepdims=True) for x in (p, q)]
  log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in log)
  expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  assert expected.min() < 1e-3 and expected.max() > 0.5
  divergence = jax.jit(loss.divergence)
  np.testing.assert_allclose(
    divergence(p.astype(np.float32), q.astype(np.float32)), expected, rtol=2e-3, atol=2e-6
  )
  np.testing.assert_array_equal(
    divergence(jnp.bfloat16(p), jnp.bfloat16(p)), np.zeros(T, np.float32)
  )


@pytest.mark.parametrize("head", ["tied", "untied", "quantized"])
def test_a_model_s_losses_are_those_of_its_logits(head, monkeypatch):
  monkeypatch.setattr(linear_cross_entropy, "widest", lambda: 24)  # of 64
  c = dataclasses.replace(small_models.STUDY, tied=head != "untied", blocks=1)
  recipe = quant.Recipe(rules=(("head", quant.RECIPES["rtn_w8a8"].default), (".*", None)))
  dot_general_for = quant.dot_general_for(recipe) if head == "quantized" else None
  model = transformer.Transformer(c, dot_general_for)
  tokens = jnp.asarray(small_models.tokens(0)["tokens"])
  targets = jnp.roll(tokens, -1, 1)

  @jax.jit
  def both(params):
    losses = model.apply({"params": params}, tokens, method="losses", targets_BxL=targets)
    logits = model.apply({"params": params}, tokens)
    return losses, loss.cross_entropy(loss.flat_logits(logits), targets.reshape(-1))

  losses, expected = both(transformer.init(model, 0))
  np.testing.assert_allclose(losses.reshape(-1), expected, rtol=1e-5, atol=1e-5)
