"""Floors of steps whose products, decompositions and bytes a person can add up."""

import jax
import jax.numpy as jnp
import pytest

from beyond_outliers import hardware, optim
from beyond_outliers.bench import floors, kernels

M, N = 32, 96


def tree(*shapes):
  return {f"x{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}


def size(params):
  return sum(x.size for x in params.values())


def symmetric(m, n, share=1.0):
  return share * 2 * m * m * n


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_muon_multiplies_in_its_dtype_and_by_halves_as_on_cpu(dtype):
  """Five times X Xᵀ, its square, and the product of their sum and X; from 256 rows on, symmetric
  products take 3/4 of the FLOPs. Parameters and average are read and written, gradients read."""
  params = tree((M, M), (N, M), (256, 512))
  (step,) = floors.late_needs(optim.muon(0.01, ns_dtype=dtype), params, period=1)
  products = sum(
    symmetric(m, n, share) + symmetric(m, m, share) + 2 * m * m * n
    for m, n, share in [(M, M, 1), (M, N, 1), (256, 512, 3 / 4)]
  )
  assert step.flops == {dtype: 5 * products}
  assert step.moved_bytes == pytest.approx(20 * size(params), abs=100)


def shampoo(refresh):
  return optim.shampoo(
    0.01, precondition_frequency=20, start_step=1, block_size=N, refresh=refresh, grafting="none"
  )


@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_shampoo_decomposes_each_matrix_once_in_a_period(refresh):
  params = tree((M, M), (M, M), (M, N))
  steps = floors.late_needs(shampoo(refresh), params, period=20)
  calls = {}
  for step in steps:
    for kind, flops in step.flops.items():
      if isinstance(kind, floors.Decomposition):
        assert kind.primitive.name == "eigh"
        shape = kind.operands[0].shape
        calls[shape] = calls.get(shape, 0) + flops / kind.flops
  assert calls == {(M, M): 5, (N, N): 1}


def test_a_step_moves_what_it_renews():
  """Shampoo renews averages and statistics at every step, and roots at every twentieth."""
  params = tree((M, M), (M, N))
  moved = [step.moved_bytes for step in floors.late_needs(shampoo("together"), params, period=20)]
  squares = 3 * M * M + N * N
  assert moved[:19] == [moved[0]] * 19
  assert moved[0] == pytest.approx(20 * size(params) + 8 * squares, abs=200)
  assert moved[19] - moved[0] == pytest.approx(8 * squares, abs=200)


@pytest.mark.parametrize("bandwidth, expected", [(1e3, 28 * M * N / 1e3), (1e30, 0.0)])
def test_adamw_is_as_long_as_its_bytes(monkeypatch, bandwidth, expected):
  monkeypatch.setattr(kernels, "update_bandwidth", lambda repeats: bandwidth)
  found = floors.floor_seconds(optim.adamw(0.01), tree((M, N)), period=1, repeats=1)
  assert found == pytest.approx(expected, rel=0.01, abs=1e-9)


def test_kernels_are_timed_alone_and_a_floor_is_the_mean_over_a_period(monkeypatch):
  """Every decomposition is made to take three seconds; products and bytes take none."""
  timed = []

  def three_seconds(call, repeats):
    timed.append(jax.tree.map(jnp.shape, call()))
    return 3.0

  monkeypatch.setattr(hardware, "median_seconds", three_seconds)
  monkeypatch.setattr(kernels, "update_bandwidth", lambda repeats: 1e30)
  monkeypatch.setattr(kernels, "product_rate", lambda dtype, repeats: {"float32": 1e30}[dtype])
  found = floors.floor_seconds(shampoo("together"), tree((M, M), (M, N)), period=20, repeats=1)
  assert found == pytest.approx(4 * 3.0 / 20)
  assert sorted(vectors for vectors, _ in timed) == [(M, M), (N, N)]


def test_the_longer_of_products_and_bytes_counts(monkeypatch):
  monkeypatch.setattr(kernels, "product_rate", lambda dtype, repeats: 1e6)
  monkeypatch.setattr(kernels, "update_bandwidth", lambda repeats: 1e30)
  tx, params = optim.muon(0.01), tree((M, N))
  products = floors.floor_seconds(tx, params, period=1, repeats=1)
  assert products == pytest.approx(5 * (4 * M * M * N + 2 * M**3) / 1e6)
  monkeypatch.setattr(kernels, "update_bandwidth", lambda repeats: 1e3)
  assert floors.floor_seconds(tx, params, 1, 1) == pytest.approx(20 * M * N / 1e3, rel=0.01)


@pytest.mark.parametrize("dtype", kernels.MATMULS)
def test_rates_are_of_what_is_called(monkeypatch, dtype):
  called = []

  def two_seconds(call, repeats):
    called.append(call())
    return 2.0

  monkeypatch.setattr(hardware, "median_seconds", two_seconds)
  width = kernels.WIDTH
  assert kernels.product_rate(dtype, 1) == width**3
  assert kernels.update_bandwidth(1, count=2**12) == 2**12
  product, updated = called
  assert product.shape == (1, width, width) and updated.nbytes == 2**12
