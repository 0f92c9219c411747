"""Every implementation against a loop over heads and rows in float64 NumPy, on lengths around the
block's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beyond_outliers.model import attention

B, H, K, Dh = 2, 6, 2, 8
NAMES = list(attention.IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention, "MIN_BLOCK", 4)
  monkeypatch.setattr(attention, "MAX_BLOCKS", 4)


def naive(q, k, v, segments, g):
  """(y, dq, dk, dv) of sum(y * g), row by row."""
  y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
  for b in range(q.shape[0]):
    for h in range(q.shape[2]):
      n = h // (q.shape[2] // k.shape[2])
      for i in range(q.shape[1]):
        past = [j for j in range(i + 1) if segments is None or segments[b, i] == segments[b, j]]
        scores = k[b, past, n] @ q[b, i, h]
        p = np.exp(scores - scores.max())
        p /= p.sum()
        y[b, i, h] = p @ v[b, past, n]
        dp = v[b, past, n] @ g[b, i, h]
        ds = p * (dp - p @ dp)
        dq[b, i, h] = ds @ k[b, past, n]
        dk[b, past, n] += ds[:, None] * q[b, i, h]
        dv[b, past, n] += p[:, None] * g[b, i, h]
  return y, dq, dk, dv


def problem(L, seed=0):
  draw = np.random.default_rng(seed)
  q, k, v, g = (draw.standard_normal((B, L, heads, Dh)) for heads in (H, K, K, H))
  segments = np.sort(draw.integers(1, 4, (B, L)), axis=1).astype(np.int32)
  return q, k, v, g, segments


def forward_and_gradients(name, q, k, v, segments, g):
  y, pullback = jax.vjp(
    lambda q, k, v: attention.attention(q, k, v, segments, implementation=name), q, k, v
  )
  return y, *pullback(g.astype(y.dtype))


compiled = jax.jit(forward_and_gradients, static_argnums=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("L", [1, 3, 16, 23])
@pytest.mark.parametrize("name", ["plain", "blockwise"])
def test_equals_the_naive_loop_in_float64(name, L, masked):
  q, k, v, g, segments = problem(L)
  segments = segments if masked else None
  with jax.enable_x64(True):
    ours = compiled(name, *map(jnp.asarray, (q, k, v)), segments, g)
  for a, b in zip(ours, naive(q, k, v, segments, g), strict=True):
    assert a.dtype == jnp.float64
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_type_and_its_precision(name, dtype, tolerance):
  q, k, v, g, segments = problem(21)
  q, k, v, g = (jnp.asarray(x, dtype) for x in (q, k, v, g))
  ours = compiled(name, q, k, v, segments, g)
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
  for a, b in zip(ours, naive(q, k, v, segments, g), strict=True):
    assert a.dtype == dtype
    assert np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", NAMES)
def test_segments_that_go_on_from_one_are_as_if_each_stood_behind_it_alone(name):
  q, k, v, _, _ = problem(8)
  # A context of three tokens, two that go on from it, of two and one, and another text of two.
  tree = np.repeat(np.array([[0, 2], [1, 1], [2, 2], [3, 3]], np.int32), [3, 2, 1, 2], axis=0)
  attend = jax.jit(functools.partial(attention.attention, implementation=name))
  y = attend(*map(np.float32, (q, k, v)), np.broadcast_to(tree, (B, 8, 2)))
  for path in ([0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7]):
    alone, *_ = naive(q[:, path], k[:, path], v[:, path], None, np.zeros_like(q[:, path]))
    np.testing.assert_allclose(y[:, path], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_softmax_is_safe_at_large_scores(name):
  q, k, v, g, _ = problem(9)
  ours = compiled(name, *(jnp.asarray(x, jnp.float32) for x in (q * 1e3, k, v)), None, g)
  assert all(bool(jnp.isfinite(x).all()) for x in ours)


@pytest.mark.parametrize("name", ["plain", "blockwise"])
def test_eight_devices_agree_with_one_inside_scan_and_remat(name):
  q, k, v, g, segments = problem(13)
  q, k, v, g = (jnp.asarray(np.concatenate([x, x]), jnp.float32) for x in (q, k, v, g))
  segments = np.concatenate([segments, segments])

  def loss(q, k, v, segments, g):
    attend = jax.checkpoint(lambda q: attention.attention(q, k, v, segments, implementation=name))
    y, _ = jax.lax.scan(lambda q, _: (attend(q), None), q, length=2)
    return (y * g).sum()

  grad = jax.grad(loss, (0, 1, 2))
  one = jax.jit(grad)(q, k, v, segments, g)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
  heads, rows = (
    NamedSharding(mesh, P(("data", "fsdp"), None, "model")),
    NamedSharding(mesh, P(("data", "fsdp"))),
  )
  eight = jax.jit(grad, in_shardings=(heads, heads, heads, rows, heads), out_shardings=heads)(
    q, k, v, segments, g
  )
  for a, b in zip(eight, one, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_blockwise_never_holds_all_scores(monkeypatch):
  q, k, v, g, _ = problem(64)
  q, k, v, g = (jnp.asarray(x, jnp.float32) for x in (q, k, v, g))
  text = (
    jax.jit(lambda *x: forward_and_gradients("blockwise", *x[:3], None, x[3]))
    .lower(q, k, v, g)
    .as_text()
  )
  assert "16x64xf32" in text  # a block of 16 queries by 64 keys
  assert "64x64xf32" not in text


@pytest.mark.parametrize("name", NAMES)
def test_no_mask_lies_in_the_program(name):
  """It would be L² bytes of every program, on every device."""
  q, k = (jax.ShapeDtypeStruct((1, 512, heads, Dh), jnp.float32) for heads in (H, K))
  lowered = jax.jit(forward_and_gradients, static_argnums=0).lower(name, q, k, k, None, q)
  constants = re.findall(r"stablehlo.constant dense<(.*?)>", lowered.as_text())
  assert constants and max(map(len, constants)) < 100


def test_fused_refuses_float64_rather_than_lose_precision():
  with (
    jax.enable_x64(True),
    pytest.raises(ValueError, match=r"model.attention = 'fused' in float64: .*blockwise"),
  ):
    attention.attention(*(jnp.zeros((1, 1, 1, 1), jnp.float64),) * 3, implementation="fused")


def test_unknown_name_is_refused_with_the_choice():
  with pytest.raises(
    ValueError, match=r"model.attention = 'flash': expected one of 'plain', 'blockwise', 'fused'"
  ):
    attention.attention(*(jnp.zeros((1, 1, 1, 1)),) * 3, implementation="flash")


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_float32_on_accelerators_too(name):
  """Where nothing is said, GPUs multiply in TF32 and TPUs in bfloat16 passes."""
  q, k = (jax.ShapeDtypeStruct((1, 16, heads, Dh), jnp.float32) for heads in (H, K))

  def gradients(q, k, v):
    return jax.grad(lambda q: attention.attention(q, k, v, implementation=name).sum())(q)

  traced = jax.jit(gradients).trace(q, k, k)
  for platform in ("cuda", "tpu"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
