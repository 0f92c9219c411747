"""Cross entropy in chunks of the vocabulary against float64 NumPy, which has all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beyond_outliers.model.loss import cross_entropy
from beyond_outliers.ops import dot
from beyond_outliers.ops import linear_cross_entropy as chunked

T, D, WIDEST = 16, 12, 16


@pytest.fixture(autouse=True)
def narrow_chunks(monkeypatch):
  monkeypatch.setattr(chunked, "widest", lambda: WIDEST)


def problem(V, dtype=np.float64):
  """(x, [V, D] weights, targets, cotangent) of values that `dtype` holds; a third of the targets
  weigh nothing."""
  draw = np.random.default_rng(0)
  x, weights = (draw.standard_normal((n, D)).astype(dtype).astype(np.float64) for n in (T, V))
  targets = draw.integers(0, V, T).astype(np.int32)
  targets[:3] = 0, V - 1, V // 2
  return x, 2 * weights, targets, draw.standard_normal(T) * (np.arange(T) % 3 > 0)


def naive(x, weights, targets, g):
  """(nll, dx, dweights) of sum(nll * g)."""
  logits = x @ weights.T
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dlogits = g[:, None] * (p - np.eye(len(weights))[targets])
  return -np.log(p[np.arange(T), targets]), dlogits @ weights, dlogits.T @ x


def with_gradients(loss, x, weights, g):
  nll, pullback = jax.vjp(loss, x, weights)
  return nll, *pullback(g)


def whole(x, weights, targets):
  """The same with all logits at once."""
  return cross_entropy(dot.dot_general(x, weights, (((1,), (1,)), ((), ()))), targets)


@pytest.mark.parametrize(
  "dtype,V,axis,tolerance",
  [
    ("float64", 61, 0, 1e-13),
    ("float64", 61, 1, 1e-13),
    ("float32", 64, 0, 3e-6),  # four equal chunks
    ("float32", 7, 1, 3e-6),  # less than one
  ],
)
def test_equals_numpy_however_the_chunks_add_up(dtype, V, axis, tolerance):
  x, weights, targets, g = problem(V)
  with jax.enable_x64(dtype == "float64"):
    operands = [jnp.asarray(a, dtype) for a in (x, weights if axis == 0 else weights.T, g)]
    nll, dx, dweights = jax.jit(
      lambda x, weights, g: with_gradients(
        lambda x, w: chunked.linear_cross_entropy(x, w, targets, axis), x, weights, g
      )
    )(*operands)
  assert {nll.dtype, dx.dtype, dweights.dtype} == {jnp.dtype(dtype)}
  found = nll, dx, dweights if axis == 0 else dweights.T
  for actual, expected in zip(found, naive(x, weights, targets, g), strict=True):
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_bfloat16_gradients_are_about_as_good_as_those_of_all_logits():
  """Exponentials are rounded, and the gradient made of them again. The loss is not touched."""
  x, weights, targets, g = problem(61, jnp.bfloat16)
  operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.float32), jnp.float32(g)
  expected = naive(x, weights, targets, g)
  errors = {}
  for loss in (whole, lambda *operands: chunked.linear_cross_entropy(*operands, 0)):
    found = jax.jit(
      lambda *operands, loss=loss: with_gradients(lambda x, w: loss(x, w, targets), *operands)
    )(*operands)
    assert [a.dtype for a in found] == [jnp.float32, jnp.bfloat16, jnp.float32]
    errors[loss] = [
      np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
      for a, b in zip(found, expected, strict=True)
    ]
  (loss, *plain), (chunked_loss, *rounded) = errors.values()
  assert chunked_loss < loss + 1e-6
  assert max(rounded) < 2**-8 and all(np.array(rounded) < 2 * np.array(plain))


def test_tells_what_is_not_finite_and_targets_outside_of_the_vocabulary():
  x, weights, targets, g = problem(61)
  x[1, 0], weights[60, 3] = np.nan, 1e38
  x[2, 3], targets[3:5] = 1e30, (61, -1)
  found = jax.jit(
    lambda x, weights: with_gradients(
      lambda x, w: chunked.linear_cross_entropy(x, w, targets, 0), x, weights, jnp.float32(g)
    )
  )(jnp.float32(x), jnp.float32(weights))
  assert np.isnan(found[0][1:5]).all()
  assert np.isnan(found[1][1]).all() and np.isnan(found[2]).all()


def test_sharded_it_agrees_with_numpy_and_sums_over_the_mesh_once():
  V = 120  # 60 on a device, which chunks don't divide
  x, weights, targets, g = problem(V)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
  tokens, table = (
    NamedSharding(mesh, P(*axes)) for axes in ((("data", "fsdp"),), ("model", "fsdp"))
  )
  with jax.set_mesh(mesh):
    program = jax.jit(
      lambda x, weights, targets, g: with_gradients(
        lambda x, w: chunked.linear_cross_entropy(x, w, targets, 0, P(("data", "fsdp"), "model")),
        x,
        weights,
        g,
      ),
      out_shardings=(tokens, tokens, table),
    )
    operands = jax.device_put(
      (jnp.float32(x), jnp.float32(weights), targets, jnp.float32(g)),
      (tokens, table, tokens, tokens),
    )
    compiled = program.lower(*operands).compile()
  for actual, expected in zip(compiled(*operands), naive(x, weights, targets, g), strict=True):
    np.testing.assert_allclose(actual, expected, atol=3e-6 * np.abs(expected).max(), rtol=0)
  text = compiled.as_text()
  bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
  assert bodies
  for computation in re.split(r"\n(?=%|ENTRY)", text):
    if computation.split(" ")[0].lstrip("%") in bodies:
      assert not re.search(r"all-(reduce|gather)|reduce-scatter", computation), computation
