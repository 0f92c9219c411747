"""Newton-Schulz against the published algorithms in float64 numpy, and what must hold of any
orthogonalisation."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beyond_outliers.optim.linalg import newton_schulz
from beyond_outliers.optim.linalg.newton_schulz import coefficients, orthogonalize

PROBLEM = pathlib.Path(__file__).parents[2] / "golden" / "problem.npz"
QUINTIC = (3.4445, -4.7750, 2.0315)
# arXiv 2505.16932, algorithm 1, before its safety factor.
POLAR_EXPRESS = [
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
  (1.875, -1.25, 0.375),
]
SAFE = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS[:-1]] + POLAR_EXPRESS[-1:]


def published(x, steps, table="quintic"):
  """One matrix, in the official order of operations."""
  x = np.asarray(x, np.float64)
  if x.shape[0] > x.shape[1]:
    return published(x.T, steps, table).T
  if table == "quintic":
    x, rows = x / (np.linalg.norm(x) + 1e-7), [QUINTIC] * steps
  else:
    x, rows = x / (1.01 * (np.linalg.norm(x) + 1e-7)), (SAFE + SAFE[-1:] * steps)[:steps]
  for a, b, c in rows:
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def noise(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def with_singular_values(values, columns, seed=0):
  rng, rows = np.random.default_rng(seed), len(values)
  left, right = (
    np.linalg.qr(noise(rows, rows, seed=seed))[0],
    np.linalg.qr(rng.standard_normal((columns, rows)))[0],
  )
  return (left * values) @ right.T


@pytest.mark.parametrize(
  "table, steps, shape",
  [
    ("quintic", 5, (3, 6, 10)),
    ("quintic", 5, (2, 7, 7)),
    ("quintic", 5, (3, 9, 4)),
    ("quintic", 5, (2, 1, 5)),
    ("polar_express", 5, (3, 6, 10)),
    ("polar_express", 5, (3, 9, 4)),
    ("polar_express", 5, (1, 5, 1)),
    ("quintic", 1, (2, 7, 7)),
    ("polar_express", 9, (2, 7, 7)),
  ],
)
def test_it_is_the_published_algorithm(table, steps, shape):
  x = noise(*shape)
  with jax.enable_x64(True):
    ours = orthogonalize(jnp.asarray(x), steps=steps, table=table)
  assert ours.dtype == jnp.float64 and ours.shape == shape
  for one, matrix in zip(ours, x, strict=True):
    np.testing.assert_allclose(one, published(matrix, steps, table), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows, share", [(255, 1), (256, 3 / 4), (517, 0.626), (768, 5 / 8)])
def test_symmetric_products_in_halves_are_whole_ones(rows, share):
  """Many rows are cut in halves, which may be unequal, and these again. share: of the full
  product's multiplications."""
  y, product = (
    noise(rows, 9),
    functools.partial(newton_schulz._symmetric_product, dtype=jnp.dtype("float64")),
  )
  with jax.enable_x64(True):
    jaxpr = jax.make_jaxpr(product)(y, y)
    np.testing.assert_allclose(product(jnp.asarray(y), jnp.asarray(y)), y @ y.T, rtol=0, atol=1e-12)
  entries = [
    math.prod(map(int, found))
    for found in re.findall(r":f64\[(\d+),(\d+)\] = dot_general", str(jaxpr))
  ]
  assert sum(entries) / rows**2 == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
  "dtype, operands, precision", [("float32", "f32", "HIGHEST"), ("bfloat16", "bf16", "DEFAULT")]
)
@pytest.mark.parametrize("shape", [(6, 4, 8), (6, 8, 4)])
def test_accelerators_multiply_whole_stacks(shape, dtype, operands, precision):
  """Three products per step, of the whole stack, on the short side, with float32 sums; float32 must
  not silently become a faster format."""
  traced = jax.jit(functools.partial(orthogonalize, dtype=dtype)).trace(
    jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  dots = re.findall(
    r"dot_general.*batching_dims = (.*?), .*precision = \[(\w+).*"
    r": \(tensor<6x4x\d+x(\w+)>.*-> tensor<6x.*xf32>",
    traced.lower(lowering_platforms=("tpu",)).as_text(),
  )
  assert dots == [("[0] x [0]", precision, operands)] * 3


def test_accelerators_compute_what_cpus_do():
  x = jnp.asarray(noise(3, 5, 9), jnp.float32) * jnp.asarray([1e-25, 1, 1e25])[:, None, None]
  options = ((QUINTIC,) * 2,) * 2, jnp.dtype("float32")
  together = newton_schulz._iterate(x, 1e-7, *options, newton_schulz._product_with_transpose)
  np.testing.assert_allclose(
    together, newton_schulz._orthogonalize(x, 1e-7, *options), rtol=0, atol=1e-5
  )


@pytest.mark.parametrize(
  "table, steps, low, high, least",
  [
    ("quintic", 5, 0.68, 1.135, 1e-2),
    ("polar_express", 5, 0.87, 1.125, 2e-3),
    ("polar_express", 6, 0.997, 1.002, 2e-3),
  ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_end_near_one(table, steps, low, high, least, dtype):
  """And singular vectors stay: the result is symmetric in the basis of the input."""
  values = np.geomspace(least, 1, 24)
  x = with_singular_values(values / np.linalg.norm(values), 40)
  slack = 1e-4 if dtype == "float32" else 0.06
  ours = np.asarray(
    orthogonalize(jnp.asarray(x, jnp.float32)[None], steps=steps, table=table, dtype=dtype)[0],
    np.float64,
  )
  after = np.linalg.svd(ours, compute_uv=False)
  assert (
    after.min() > low - slack - (values[0] / np.linalg.norm(values) < least)
    and after.max() < high + slack
  )
  product = ours @ x.T
  np.testing.assert_allclose(product, product.T, rtol=0, atol=slack)


@pytest.mark.parametrize(
  "table, columns, dtype, deviations",
  [
    ("quintic", 16, jnp.float32, (2e-5, 3e-5, 4e-5)),
    ("quintic", 128, jnp.float32, (2e-5, 3e-5, 4e-5)),
    ("polar_express", 48, jnp.float32, (8e-5, 2.6e-4, 4e-4)),
    ("polar_express", 128, jnp.float64, (2e-11, 2e-10, 2e-10)),
  ],
)
def test_iterating_on_the_gram_matrix_changes_only_rounding(table, columns, dtype, deviations):
  """In the spectral norm, twice what the docstring has, for conditions of 1e2, 1e4 and 1e6."""
  x = np.stack(
    [
      with_singular_values(np.geomspace(1, 1 / condition, 16), columns)
      for condition in (1e2, 1e4, 1e6)
    ]
  )
  with jax.enable_x64(True):
    plain, gram = (
      np.asarray(orthogonalize(jnp.asarray(x, dtype), table=table, gram=gram))
      for gram in (False, True)
    )
  assert (np.linalg.norm(gram - plain, 2, axis=(1, 2)) < deviations).all() and not (
    gram == plain
  ).all()


def test_the_gram_matrix_is_renewed_before_its_errors_matter():
  """For a singular matrix, whose zero eigenvalues are rounded to negative ones, which would grow
  without bound."""
  x = jnp.asarray(
    with_singular_values(np.r_[np.geomspace(1, 1e-2, 20), np.zeros(12)], 60), jnp.float32
  )[None]
  plain, gram = orthogonalize(x, steps=10), orthogonalize(x, steps=10, gram=True)
  assert np.linalg.norm(gram[0], 2) < 1.2
  kept = np.linalg.svd(x[0])[0][:, :20]
  np.testing.assert_allclose(kept.T @ gram[0], kept.T @ plain[0], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(
    orthogonalize(x, gram=True, dtype="bfloat16"), orthogonalize(x, dtype="bfloat16")
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_does_not_matter(dtype):
  """Squares of these leave float32, and an eps of 1e-7 would be all that is left of a norm."""
  x = noise(1, 8, 12)

  def scaled(scale):
    return orthogonalize(jnp.asarray(x * scale, jnp.float32), dtype=dtype)

  for scale in (1e-30, 1e-12, 1e-7, 1e-3, 1e3, 1e30):
    np.testing.assert_allclose(
      scaled(scale), scaled(1.0), rtol=0, atol=2e-5 if dtype == "float32" else 2e-2
    )


def test_eps_is_the_official_one_where_norms_are_ordinary():
  """torch.optim.Muon divides by the norm alone, as 0 does."""
  x = noise(1, 4, 6)
  with jax.enable_x64(True):
    x = jnp.asarray(0.02 * x / np.linalg.norm(x))
    np.testing.assert_allclose(orthogonalize(x)[0], published(x[0], 5), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
      orthogonalize(x, eps=0.0), orthogonalize(1e6 * x, eps=0.0), rtol=0, atol=1e-12
    )
    assert abs(orthogonalize(x, eps=0.0) - orthogonalize(x)).max() > 1e-7


@pytest.mark.parametrize(
  "options", [{}, {"dtype": "bfloat16"}, {"gram": True}, {"table": "polar_express"}, {"eps": 0.0}]
)
def test_zero_matrices_stay_zero_among_others(options):
  x = jnp.asarray(noise(3, 4, 6), jnp.float32).at[1].set(0)
  ours, whole = orthogonalize(x, **options), orthogonalize(x.at[1].set(1), **options)
  assert not ours[1].any() and whole.any((1, 2)).all()
  np.testing.assert_array_equal(ours[::2], whole[::2])
  assert not orthogonalize(jnp.zeros_like(x), **options).any()


def test_a_stack_is_its_matrices():
  x = jnp.asarray(noise(3, 4, 6), jnp.float32) * jnp.asarray([1e-20, 1, 1e20])[:, None, None]
  alone = jnp.concatenate([orthogonalize(x[i : i + 1]) for i in range(3)])
  np.testing.assert_allclose(orthogonalize(x), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, deviation", [("w1", 6.4e-4), ("w2", 4.2e-4)])
def test_bfloat16_is_closer_to_float64_than_the_official_one(name, deviation):
  """deviation: the official one's largest of parameters after a first step of 0.02, in
  golden/manifest.json; here the mean over thirty gradients of the largest. w1 [24, 16] is tall."""
  x = np.load(PROBLEM)[f"g_{name}"]
  scale = 0.02 * np.sqrt(max(1, x.shape[1] / x.shape[2]))
  ours = orthogonalize(jnp.asarray(x), dtype="bfloat16")
  assert (ours != ours.astype(jnp.bfloat16)).any()  # the last sums are not rounded
  largest = [abs(one - published(matrix, 5)).max() for one, matrix in zip(ours, x, strict=True)]
  assert 1e-4 < scale * np.mean(largest) < 0.8 * deviation


@pytest.mark.parametrize("operands", [None, "bfloat16", "float64"])
def test_the_dtype_is_that_of_the_input(operands):
  with jax.enable_x64(True):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
      assert (
        jax.eval_shape(
          functools.partial(orthogonalize, dtype=operands), jnp.ones((2, 3, 4), dtype)
        ).dtype
        == dtype
      )


@pytest.mark.parametrize("matrices", [1, 3])
def test_bfloat16_works_between_transposes(matrices):
  """XLA folds a caller's transposes into bfloat16 products, and CPUs have those of some layouts
  only."""
  x = jnp.asarray(noise(matrices, 6, 10), jnp.float32)
  turned = jax.jit(lambda x: 2 * orthogonalize(x.mT, dtype="bfloat16").mT)(x.mT.mT)
  np.testing.assert_allclose(turned, 2 * orthogonalize(x, dtype="bfloat16"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps, tolerance", [(6, 2e-3), (8, 1e-5)])
def test_polar_express_keeps_orthogonal_matrices(steps, tolerance):
  x = with_singular_values(np.ones(8), 20)
  ours = orthogonalize(jnp.asarray(x, jnp.float32)[None], steps=steps, table="polar_express")[0]
  np.testing.assert_allclose(ours, x, rtol=0, atol=tolerance)


def test_coefficients_are_repeated_or_cut():
  assert coefficients("quintic", 3) == (QUINTIC,) * 3
  ten = coefficients("polar_express", 10)
  np.testing.assert_allclose(ten[1:], SAFE[1:] + SAFE[-1:] * 2, rtol=1e-15)
  assert coefficients("polar_express", 2) == ten[:2]
  assert coefficients([[2, -1.5, 0.5], (1.5, -0.5, 0)], 3) == (
    (2.0, -1.5, 0.5),
    (1.5, -0.5, 0.0),
    (1.5, -0.5, 0.0),
  )


@pytest.mark.parametrize(
  "table, steps, message",
  [
    ("quintc", 5, "table = 'quintc': did you mean 'quintic'"),
    ("", 5, "expected one of 'quintic', 'polar_express'"),
    ((), 5, "expected a name or a sequence of triples"),
    (QUINTIC, 5, "sequence of triples"),
    (((1.5, -0.5),), 5, "triples"),
    (((1.5, -0.5, float("nan")),), 5, "finite"),
    ((("a", "b", "c"),), 5, "triples"),
    (None, 5, "triples"),
    ("quintic", 0, "steps = 0: expected at least 1"),
  ],
)
def test_tables_that_cannot_be_are_refused(table, steps, message):
  with pytest.raises(ValueError, match=message):
    coefficients(table, steps)
  with pytest.raises(ValueError, match=message):
    orthogonalize(jnp.ones((1, 2, 3)), table=table, steps=steps)


def test_arrays_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match=r"x of shape \(2, 3\): expected a stack"):
    orthogonalize(jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="dtype = 'bfloat61': did you mean 'bfloat16'"):
    orthogonalize(jnp.ones((1, 2, 3)), dtype="bfloat61")
