"""The linear layers' product against float64, and that its backward products stay narrow."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beyond_outliers.ops import dot
from beyond_outliers.ops.outline import materialized_transpose

KERNEL, EMBEDDING = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))
CASES = [(KERNEL, (24, 32)), (EMBEDDING, (32, 24))]  # dimension numbers, shape of the right one


def problem(rhs_shape, dtype=np.float64):
  draw = np.random.default_rng(0)
  return [draw.standard_normal(shape).astype(dtype) for shape in ((16, 24), rhs_shape, (16, 32))]


def naive(x, w, g, numbers):
  """(y, dx, dw) of sum(y * g)."""
  return (x @ w, g @ w.T, x.T @ g) if numbers == KERNEL else (x @ w.T, g @ w, g.T @ x)


def forward_and_gradients(x, w, g, numbers, **kwargs):
  y, pullback = jax.vjp(lambda x, w: dot.dot_general(x, w, numbers, **kwargs), x, w)
  return y, *pullback(g.astype(y.dtype))


@pytest.mark.parametrize("numbers,shape", CASES)
def test_float64_stays_float64(numbers, shape):
  x, w, g = problem(shape)
  with jax.enable_x64(True):
    ours = forward_and_gradients(*map(jnp.asarray, (x, w, g)), numbers)
  for a, b in zip(ours, naive(x, w, g, numbers), strict=True):
    assert a.dtype == jnp.float64
    np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_float32_kernel_beside_float64_inputs_loses_nothing():
  x, w, g = problem((24, 32))
  w = w.astype(np.float32)
  with jax.enable_x64(True):
    y, _, dw = forward_and_gradients(*map(jnp.asarray, (x, w, g)), KERNEL)
  np.testing.assert_allclose(y, x @ w.astype(np.float64), rtol=1e-13, atol=1e-13)
  assert y.dtype == jnp.float64 and dw.dtype == jnp.float32


@pytest.mark.parametrize("numbers,shape", CASES)
def test_float32_is_lax(numbers, shape):
  x, w, g = map(jnp.asarray, problem(shape, np.float32))
  y, pullback = jax.vjp(lambda x, w: lax.dot_general(x, w, numbers), x, w)
  for a, b in zip(forward_and_gradients(x, w, g, numbers), (y, *pullback(g)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "types", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("numbers,shape", CASES)
def test_bfloat16_operands_float32_sums_and_each_cotangent_in_its_type(numbers, shape, types):
  x, w, g = problem(shape)
  x, w, g = jnp.asarray(x, types[0]), jnp.asarray(w, types[1]), jnp.asarray(g, jnp.float32)
  rounded = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w, g))
  ours = jax.jit(forward_and_gradients, static_argnums=3)(x, w, g, numbers)
  for a, b, dtype in zip(ours, naive(*rounded, numbers), ("float32", *types), strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, rtol=1e-5 if dtype == "float32" else 4e-3, atol=1e-5
    )


@pytest.mark.parametrize("numbers,shape", CASES)
def test_every_product_of_a_step_is_narrow(numbers, shape):
  x, w, g = problem(shape)
  x, w, g = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32)
  jaxpr = str(jax.make_jaxpr(forward_and_gradients, static_argnums=3)(x, w, g, numbers))
  text = jax.jit(forward_and_gradients, static_argnums=3).lower(x, w, g, numbers).as_text()
  products = re.findall(r"stablehlo.dot_general.*: \((.*?)\) -> (.*)", text)
  assert jaxpr.count("dot_general[") == 3 == len(products)
  assert all(
    operands.count("bf16") == 2 and result.endswith("f32>") for operands, result in products
  ), products


@pytest.mark.parametrize("asked, used", [(None, "HIGHEST"), (lax.Precision.HIGH, "HIGH")])
@pytest.mark.parametrize("numbers,shape", CASES)
def test_a_precision_is_that_of_all_three_products(numbers, shape, asked, used):
  operands = map(jnp.asarray, problem(shape, np.float32))
  compute = jax.jit(lambda x, w, g: forward_and_gradients(x, w, g, numbers, precision=asked))
  text = compute.lower(*operands).as_text()
  assert re.findall(r"precision = \[(\w+), (\w+)\]", text) == [(used, used)] * 3


def test_result_type_can_be_asked_for():
  x, w, g = problem((24, 32))
  y, dx, _ = forward_and_gradients(
    jnp.asarray(x, jnp.bfloat16),
    jnp.asarray(w, jnp.bfloat16),
    jnp.asarray(g),
    KERNEL,
    preferred_element_type=jnp.bfloat16,
  )
  assert y.dtype == dx.dtype == jnp.bfloat16


def test_transposed_copies_bits():
  x = jnp.asarray([[1.0, -0.0, jnp.inf], [jnp.nan, 3e-39, -2.5]], jnp.bfloat16)
  ours = jax.jit(materialized_transpose)(x)
  np.testing.assert_array_equal(np.asarray(ours).view(np.uint16), np.asarray(x).T.view(np.uint16))


@pytest.mark.parametrize("kernel_axes", [("fsdp", "model"), ("model", "fsdp")])
def test_eight_devices_agree_with_one(kernel_axes):
  x, w, g = problem((24, 32))
  x, w, g = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
  rows, kernel = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(*kernel_axes))
  one = jax.jit(forward_and_gradients, static_argnums=3)(x, w, g, KERNEL)
  eight = jax.jit(
    forward_and_gradients,
    static_argnums=3,
    in_shardings=(rows, kernel, rows),
    out_shardings=(rows, rows, kernel),
  )(x, w, g, KERNEL)
  for a, b in zip(eight, one, strict=True):
    a, b, rtol = (
      np.asarray(a, np.float32),
      np.asarray(b, np.float32),
      1e-2 if a.dtype == jnp.bfloat16 else 1e-5,
    )
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


def test_narrow_product_of_other_shapes_is_refused_with_the_remedy():
  with pytest.raises(
    ValueError, match=r"dimension_numbers = .*reshape the inputs to \[tokens, features\]"
  ):
    dot.dot_general(
      jnp.zeros((2, 3, 4), jnp.bfloat16), jnp.zeros((4, 5), jnp.bfloat16), (((2,), (0,)), ((), ()))
    )
