"""Quantizers against independent references: the published formulas in numpy float64, and ml_dtypes
bit by bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from beyond_outliers.errors import ConfigError
from beyond_outliers.quant import LayerRecipe, QuantSpec, dequantize, quantizers, rotations
from beyond_outliers.quant.grids import GRIDS
from beyond_outliers.quant.scales import GAUSSIAN_BOUND, GRANULARITIES, SCALES

quantize = jax.jit(quantizers.quantize_array, static_argnames=("spec", "axis"))
fake_quantize = jax.jit(quantizers.fake_quantize, static_argnames=("spec", "axis"))

RTN = QuantSpec(4)
MXFP4 = QuantSpec(4, "e2m1", granularity="mx")
NVFP4 = QuantSpec(4, "e2m1", granularity="nv")


def quest(bits, rotation="hadamard"):
  return QuantSpec(
    bits,
    "ternary" if bits == 1.585 else "midrise",
    "gaussian",
    rotation=rotation,
    estimator="trust",
  )


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("spec", "axis"))
def value_and_gradient(x, g, spec, axis=-1):
  y, pullback = jax.vjp(lambda x: fake_quantize(x, spec, axis), x)
  return y, pullback(g)[0]


@pytest.mark.parametrize("bits", reference.BITS)
def test_quest_is_the_published_formula(bits):
  x, g = normal(24, 256), normal(24, 256, seed=1)
  h = reference.hadamard_blocks(256, 128)
  expected, mask = reference.quest(x.astype(np.float64) @ h, bits)
  ours, gradient = value_and_gradient(x, g, quest(bits))
  reference.assert_near(ours, expected @ h.T)
  reference.assert_near(gradient, (g @ h * mask) @ h.T)


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_trust_mask_is_a_bound_on_x(bits):
  """|x̂ - x| <= half a step where |x / step| <= 2^(bits - 1); 3/2 for the ternary grid."""
  x = 2 * normal(64, 128).astype(np.float64)
  _, mask = reference.quest(x, bits)
  s = reference.OPTIMAL[bits] * np.sqrt(np.mean(x**2, axis=-1, keepdims=True)) + 1e-8
  step, bound = (s, 1.5) if bits == 1.585 else (2 * s / (2**bits - 1), 2 ** (bits - 1))
  np.testing.assert_array_equal(mask, np.abs(x / step) <= bound)
  spec = quest(bits, "none")
  saved = quantizers.forward(x, quantizers.scale_of(jnp.asarray(x, jnp.float32), spec, -1), spec)[1]
  np.testing.assert_array_equal(saved.passes, mask)


def test_four_bits_of_a_gaussian():
  """0.73 % of the gradient is masked, and the squared error is 0.0115 of the variance (arXiv
  2502.05003)."""
  x, spec = normal(1024, 1024), quest(4, "none")
  q, saved = jax.jit(lambda x: quantizers.forward(x, quantizers.scale_of(x, spec, -1), spec))(x)
  assert 1 - saved.passes.mean() == pytest.approx(0.0073, abs=5e-5)
  assert np.mean((dequantize(q) - x) ** 2) == pytest.approx(0.0115, abs=5e-5)


@pytest.mark.parametrize("count", [count for count in GAUSSIAN_BOUND if count <= 32])
def test_gaussian_bounds_are_the_least_squared_error(count):
  """By quadrature, to the digits that a parabola through three points can tell."""
  x = np.linspace(-9, 9, 400_001)
  density = np.exp(-(x**2) / 2)
  density /= density.sum()

  def error(bound):
    step = 2 * bound / (count - 1)
    return density @ (np.clip(np.round((x + bound) / step), 0, count - 1) * step - bound - x) ** 2

  best, h = GAUSSIAN_BOUND[count], 1e-2
  low, middle, high = error(best - h), error(best), error(best + h)
  assert abs(h * (low - high) / (2 * (low - 2 * middle + high))) < 1e-3


@pytest.mark.parametrize(
  "spec,levels",
  [
    *(
      (QuantSpec(b, "midrise"), [k + 0.5 for k in range(-(2 ** (b - 1)), 2 ** (b - 1))])
      for b in (1, 2, 4, 7, 8)
    ),
    (QuantSpec(1.585, "ternary"), [-1, 0, 1]),
    *((QuantSpec(b), range(1 - 2 ** (b - 1), 2 ** (b - 1))) for b in (2, 3, 4, 8)),
    *((QuantSpec(b, "unsigned"), range(2**b)) for b in (1, 4, 8)),
    *((QuantSpec(b, "twos_complement"), range(-(2 ** (b - 1)), 2 ** (b - 1))) for b in (2, 4, 8)),
  ],
)
def test_every_level_is_hit_and_no_other(spec, levels):
  step = 0.25 if spec.grid == "midrise" else 0.125  # with a gap of two, the scale is half a step
  unit = np.linspace(-200, 200, 100_001, dtype=np.float32)
  q = quantize(unit, spec, scale=jnp.full((1,), step / spec.levels.gap))
  np.testing.assert_array_equal(np.unique(dequantize(q)), step * np.asarray(levels, np.float32))
  assert q.codes.dtype == (
    jnp.int16 if spec.bits == 8 and spec.grid in ("midrise", "unsigned") else jnp.int8
  )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_round_to_nearest_has_a_scale_a_row_from_absmax(bits, axis):
  """absmax / 7 at four bits: one scale per output channel of [K, O] (axis 0), per token of [T, K]
  (axis 1)."""
  x = normal(48, 32)
  rows = x.T if axis == 0 else x
  expected, _ = reference.round_to_nearest(rows.astype(np.float64), bits)
  q = quantize(x, QuantSpec(bits), axis)
  assert q.scale.shape == ((1, 32) if axis == 0 else (48, 1))
  np.testing.assert_allclose(
    q.scale.ravel(), np.abs(rows).max(1) / (2 ** (bits - 1) - 1), rtol=1e-6
  )
  reference.assert_near(dequantize(q), expected.T if axis == 0 else expected)


@pytest.mark.parametrize(
  "scale,bound",
  [
    ("absmax", lambda x: np.abs(x).max(1) / 7),
    ("absmax_edge", lambda x: np.abs(x).max(1) / 7.5),
    ("percentile_99", lambda x: np.percentile(np.abs(x), 99, axis=1) / 7),
    ("percentile_99.9", lambda x: np.percentile(np.abs(x), 99.9, axis=1) / 7),
  ],
)
def test_scale_rules(scale, bound):
  x = normal(16, 256)
  np.testing.assert_allclose(
    quantizers.scale_of(x, QuantSpec(4, scale=scale), -1)[:, 0], bound(x), rtol=1e-5
  )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clip_search_finds_the_least_squared_error(bits):
  x = normal(8, 64)
  x[0, 0] = 30
  found = quantizers.scale_of(x, QuantSpec(bits, scale="mse"), -1)[:, 0]
  largest = 2 ** (bits - 1) - 1
  for row, scale in zip(x.astype(np.float64), found, strict=True):
    candidates = np.abs(row).max() / largest * np.arange(0.20, 1.001, 0.01)[:, None]
    errors = ((np.clip(np.round(row / candidates), -largest, largest) * candidates - row) ** 2).sum(
      1
    )
    assert scale == pytest.approx(candidates[errors.argmin(), 0], rel=1e-4)


def test_one_scale_for_the_tensor_and_one_a_group():
  x = normal(16, 64)
  q = quantize(x, QuantSpec(4, granularity="tensor"))
  np.testing.assert_allclose(q.scale, [[np.abs(x).max() / 7]], rtol=1e-6)
  for axis, rows in ((1, x), (0, x.T)):
    q = quantize(rows if axis == 1 else rows.T, QuantSpec(4, granularity="group", group=8), axis)
    scale = q.scale if axis == 1 else q.scale.T
    np.testing.assert_allclose(scale, np.abs(rows.reshape(len(rows), -1, 8)).max(2) / 7, rtol=1e-6)
    alone = quantize(rows[:, 8:16], QuantSpec(4))
    codes = q.codes if axis == 1 else q.codes.T
    np.testing.assert_array_equal(codes[:, 8:16], alone.codes)


@pytest.mark.parametrize("grid,bits", [("e4m3", 8), ("e5m2", 8), ("e2m1", 4)])
def test_float_grids_round_as_every_bit_pattern_says(grid, bits):
  levels = reference.float_levels(GRIDS[grid][bits].name)
  ties = (levels[1:] + levels[:-1]) / 2
  x = np.concatenate(
    [
      levels,
      ties,
      np.nextafter(ties.astype(np.float32), np.inf),
      np.nextafter(ties.astype(np.float32), -np.inf),
      normal(4000) * levels.max() / 3,
      [2 * levels.max(), -2 * levels.max()],
    ]
  ).astype(np.float32)
  ours = jax.jit(lambda x: GRIDS[grid][bits].round(x, jnp.round))(x)
  np.testing.assert_array_equal(
    ours, reference.nearest_level(x.astype(np.float64), GRIDS[grid][bits].name)
  )
  stored = ours.astype(GRIDS[grid][bits].dtype)
  np.testing.assert_array_equal(np.asarray(stored).astype(np.float32), ours)


@pytest.mark.parametrize(
  "grid,bits", [(grid, bits) for grid, by_bits in GRIDS.items() for bits in by_bits]
)
def test_rounding_that_goes_up_stays_on_the_grid(grid, bits):
  """As stochastic rounding of the largest level may, by float error: no code beyond it, which would
  be NaN or overflow."""
  levels = GRIDS[grid][bits]
  v = jnp.array(
    [
      -np.inf,
      2 * levels.lowest,
      levels.lowest,
      0.3,
      levels.largest,
      1.01 * levels.largest,
      3e38,
      np.inf,
    ]
  )
  codes = levels.round(v, lambda t: jnp.floor(t) + 1)
  assert codes.min() == levels.lowest and codes[4:].tolist() == [levels.largest] * 4
  np.testing.assert_array_equal(codes.astype(levels.dtype).astype(jnp.float32), codes)


def awkward(*shape):
  """Magnitudes over many powers of two, whole blocks of zeros, and maxima that are powers of
  two."""
  x = normal(*shape) * np.exp2(np.random.default_rng(1).integers(-12, 12, (shape[0], 1))).astype(
    np.float32
  )
  x[0], x[1, :32] = 0, 0
  x[2] = np.sign(x[2]) * np.exp2(np.floor(np.log2(np.abs(x[2]))))
  x[3, ::32] = np.nextafter(np.float32(4), np.float32(0))
  return x


@pytest.mark.parametrize("grid,bits", [("e2m1", 4), ("e4m3", 8), ("e5m2", 8)])
def test_mx_is_the_standards_bit_for_bit(grid, bits):
  """OCP Microscaling Formats 1.0, section 6.3: scales as the exponent bits say, elements by
  ml_dtypes."""
  x, name = awkward(32, 128), GRIDS[grid][bits].name
  largest_exponent = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[grid]
  blocks = x.reshape(32, 4, 32)
  exponent = (np.abs(blocks).max(2).view(np.uint32) >> 23).astype(int) - 127 - largest_exponent
  q = quantize(x, QuantSpec(bits, grid, granularity="mx"))
  some = np.abs(blocks).max(2) > 0
  np.testing.assert_array_equal(
    np.asarray(q.scale)[some], np.exp2(exponent.astype(np.float64))[some]
  )
  assert (q.scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32) == q.scale).all()
  scaled = np.where(some[..., None], blocks / np.exp2(exponent.astype(np.float64))[..., None], 0)
  expected = reference.nearest_level(scaled, name).reshape(x.shape).astype(getattr(ml_dtypes, name))
  np.testing.assert_array_equal(np.asarray(q.codes).astype(np.float32), expected.astype(np.float32))
  assert GRIDS[grid][bits].stored == expected.dtype and q.codes.dtype.itemsize == 1


def test_nv_is_the_published_algorithm_bit_for_bit():
  """arXiv 2509.25149, appendix C, in the order of its operations, with ml_dtypes' own rounding."""
  x = awkward(32, 128)
  q = quantize(x, NVFP4)
  f32 = np.float32
  whole = f32(np.abs(x).max() / f32(6 * 448))
  blocks = x.reshape(32, 8, 16)
  block_scale = (
    (np.abs(blocks).max(2) / f32(6) * (f32(1) / whole)).astype(ml_dtypes.float8_e4m3fn).astype(f32)
  )
  np.testing.assert_array_equal(q.scale, block_scale * whole)
  with np.errstate(divide="ignore"):
    inverse = np.where(block_scale > 0, f32(1) / (block_scale * whole), f32(0))
  expected = (
    (blocks * inverse[..., None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape)
  )
  np.testing.assert_array_equal(np.asarray(q.codes).astype(f32), expected.astype(f32))


def test_nv_a_token_is_nv_of_each_token_alone():
  x = awkward(32, 128)
  q = quantize(x, QuantSpec(4, "e2m1", granularity="nv_token"))
  for i, row in enumerate(x):
    alone = quantize(row[None], NVFP4)
    np.testing.assert_array_equal(q.scale[i], alone.scale[0])
    np.testing.assert_array_equal(
      np.asarray(q.codes[i], np.float32), np.asarray(alone.codes[0], np.float32)
    )


def test_rotations_are_orthonormal_and_undone():
  for width, block in ((256, 128), (48, 16), (7, 1)):
    eye = np.eye(width, dtype=np.float32)
    np.testing.assert_allclose(
      rotations.rotate(eye, "hadamard", 1), reference.hadamard_blocks(width, block), atol=1e-6
    )
    for rotation in ("hadamard", "randomized_hadamard"):
      matrix = np.asarray(rotations.rotate(eye, rotation, 1))
      np.testing.assert_allclose(matrix @ matrix.T, eye, atol=1e-6)
      np.testing.assert_allclose(rotations.rotate(eye, rotation, 0), matrix.T, atol=1e-6)
      np.testing.assert_allclose(rotations.unrotate(matrix, rotation, 1), eye, atol=1e-6)
    assert width == 7 or not np.allclose(matrix, rotations.rotate(eye, "hadamard", 1))


def test_a_rotation_is_float32_under_bfloat16():
  x = jnp.asarray(normal(16, 128), jnp.bfloat16)
  assert rotations.rotate(x, "hadamard", 1).dtype == jnp.float32
  assert fake_quantize(x, quest(4)).dtype == jnp.bfloat16


def test_outliers_cost_less_behind_a_rotation():
  x = normal(32, 256)
  x[:, 3] *= 50

  def error(spec):
    return np.mean((fake_quantize(x, spec) - x)[:, 4:] ** 2)

  assert error(QuantSpec(4, rotation="hadamard")) < 0.3 * error(RTN)


@pytest.mark.parametrize(
  "estimator,passes",
  [
    ("ste", lambda v: v == v),
    ("clip", lambda v: np.abs(v) <= 7),
    ("trust", lambda v: np.abs(v) <= 7.5),
  ],
)
def test_estimators(estimator, passes):
  x, scale = 10 * normal(32, 32), 0.5
  gradient = jax.grad(
    lambda x: fake_quantize(
      x, QuantSpec(4, estimator=estimator), scale=jnp.full((1, 1), scale)
    ).sum()
  )(x)
  np.testing.assert_array_equal(gradient, passes(x / scale))


@pytest.mark.parametrize("grid,low,high", [("twos_complement", -8, 7), ("unsigned", 0, 15)])
def test_learned_scales_are_the_papers(grid, low, high):
  """arXiv 1902.08153, equations 1 to 3 and 5, and section 2.2's factor."""
  spec = QuantSpec(4, grid, "learned", "tensor", estimator="lsq")
  x, g, s = 3 * normal(32, 16), normal(32, 16, seed=1), np.float32(0.5)
  x[0, :2] = low * s, high * s  # on the bounds, where the gradient stops
  y, pullback = jax.vjp(lambda x, s: fake_quantize(x, spec, scale=s), x, jnp.full((1, 1), s))
  dx, ds = pullback(g)
  v = x.astype(np.float64) / s
  inside = (v > low) & (v < high)
  slope = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v))
  reference.assert_near(y, np.round(np.clip(v, low, high)) * s)
  np.testing.assert_array_equal(dx, g * inside)
  np.testing.assert_allclose(ds, [[np.sum(g * slope) / np.sqrt(x.size * high)]], rtol=1e-5)
  np.testing.assert_allclose(
    SCALES["learned"](x, (0, 1), spec.levels), [[2 * np.abs(x).mean() / high**0.5]], rtol=1e-6
  )


@pytest.mark.parametrize(
  "spec",
  [
    QuantSpec(4, rounding="stochastic"),
    QuantSpec(4, "e2m1", rounding="stochastic"),
    QuantSpec(2, "midrise", rounding="stochastic"),
  ],
)
def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(spec):
  x = np.linspace(-3, 3, 61, dtype=np.float32)
  scale = jnp.ones((1,))
  draws = jax.vmap(lambda key: fake_quantize(x, spec, key=key, scale=scale))(
    jax.random.split(jax.random.key(0), 4000)
  )
  np.testing.assert_allclose(
    draws.mean(0), np.clip(x, spec.levels.lowest, spec.levels.largest), atol=0.07
  )
  assert all(len(np.unique(column)) <= 2 for column in draws.T)
  np.testing.assert_array_equal(
    fake_quantize(x, spec, scale=scale),
    fake_quantize(x, QuantSpec(spec.bits, spec.grid), scale=scale),
  )


@pytest.mark.parametrize(
  "spec",
  [
    quest(4),
    RTN,
    MXFP4,
    NVFP4,
    QuantSpec(4, granularity="group", group=16),
    QuantSpec(8, "e4m3", granularity="tensor"),
    QuantSpec(3, scale="mse"),
  ],
)
def test_zeros_stay_finite(spec):
  x = np.zeros((4, 64), np.float32)
  y, gradient = value_and_gradient(x, x + 1, spec)
  np.testing.assert_allclose(y, 0, atol=1e-6)
  assert np.isfinite(gradient).all()


scale_of = jax.jit(quantizers.scale_of, static_argnames=("spec", "axis"))
# Every rule, and every set of values that shares a scale.
RULES = [
  QuantSpec(
    4,
    "midrise" if rule == "gaussian" else "symmetric",
    rule,
    "tensor" if rule == "learned" else "token",
    estimator="lsq" if rule == "learned" else "ste",
  )
  for rule in SCALES
]
SETS = [
  QuantSpec(4, "e2m1", granularity=name, group=32 if name == "group" else 0)
  for name in GRANULARITIES
]


@pytest.mark.parametrize("width", [64, 4096])
@pytest.mark.parametrize("spec", RULES + SETS, ids=str)
def test_what_is_not_finite_is_in_the_scale_that_it_shares(spec, width):
  """Of one infinity among a thousand numbers, too, which a percentile would clip."""
  for number in (np.nan, -np.nan, np.inf, -np.inf):
    x = normal(2, width)
    x[1, 3] = number
    assert np.isnan(scale_of(x, spec, -1)[-1, 0]), number


@pytest.mark.parametrize(
  "spec", [RTN, QuantSpec(4, scale="learned", estimator="lsq", granularity="tensor")]
)
def test_what_is_not_finite_is_seen_under_a_scale_that_is_given(spec):
  x, scale = normal(2, 64), jnp.full((1, 1), 0.1)
  x[1, 3] = np.inf
  for function in (fake_quantize, lambda *args, **how: dequantize(quantize(*args, **how))):
    assert not np.isfinite(function(x, spec, scale=scale)[1, 3])


@pytest.mark.parametrize("rule", [rule for rule in SCALES if rule.startswith("percentile")])
def test_where_nearly_all_is_zero_a_percentile_clips_nothing(rule):
  x = np.zeros((1, 30_000), np.float32)
  x[0, 5] = 2.0
  np.testing.assert_allclose(fake_quantize(x, QuantSpec(4, scale=rule)), x, rtol=1e-6)


def test_a_scale_that_cannot_be_divided_by_shows_it():
  """1 / 3e38 is no normal number of float32, and would make zeros of all."""
  x = np.float32(3e38) * np.sign(normal(2, 64))
  assert np.isnan(fake_quantize(x, QuantSpec(2))).all()
  np.testing.assert_allclose(fake_quantize(x, QuantSpec(8)), x, rtol=1e-6)


@pytest.mark.parametrize("spec", RULES + SETS, ids=str)
def test_of_nothing_there_is_nothing(spec):
  assert fake_quantize(np.zeros((0, 64), np.float32), spec).shape == (0, 64)


REFUSED = [
  (dict(bits=9), "bits = 9"),
  (dict(bits=0), "bits = 0"),
  (dict(bits=1.585), "grid 'symmetric' has 2, 3, 4, 5, 6, 7, 8 bits"),
  (dict(bits=4, grid="midrize"), "grid = 'midrize': expected one of"),
  (dict(bits=4, grid="e4m3"), "grid 'e4m3' has 8 bits"),
  (dict(bits=4, granularity="group"), "group = 0"),
  (dict(bits=4, group=32), "only granularity 'group'"),
  (dict(bits=4, granularity="mx"), "floating-point"),
  (dict(bits=4, grid="e2m1", granularity="nv", scale="mse"), "leave it at 'absmax'"),
  (dict(bits=4, scale="gaussian"), "'midrise' and 'ternary'"),
  (dict(bits=4, grid="e2m1", estimator="trust"), "even steps"),
  (dict(bits=8, grid="e4m3", scale="absmax_edge"), "even steps"),
  (dict(bits=4, scale="learned"), "come together"),
  (dict(bits=4, estimator="lsq"), "come together"),
  (dict(bits=4, scale="learned", estimator="lsq"), "whole tensor"),
  (dict(bits=4, rounding="up"), "rounding = 'up'"),
  (dict(bits=4, grid="unsigned", rotation="hadamard"), "rotated numbers are signed"),
]


@pytest.mark.parametrize("fields,message", REFUSED)
def test_specs_that_make_no_sense_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    QuantSpec(**fields)


@pytest.mark.parametrize(
  "fields,message",
  [
    (
      dict(weights=quest(4), activations=QuantSpec(4, granularity="token")),
      "activations.rotation = 'none': must equal",
    ),
    (dict(weights=QuantSpec(4, granularity="token")), "weights have channels"),
    (dict(activations=QuantSpec(4, granularity="channel")), "activations have tokens"),
    (dict(), "quantizes nothing"),
    (dict(weights=RTN, backward="none"), "backward = 'none'"),
    (dict(weights=RTN, gradients=quest(4)), "gradients.granularity"),
    (dict(gradients=QuantSpec(8, granularity="token", rotation="hadamard")), "not rotated"),
    (dict(weights=QuantSpec(4, "unsigned")), "weights.grid = 'unsigned': they are signed"),
    (
      dict(gradients=QuantSpec(8, "unsigned", granularity="token")),
      "gradients.grid = 'unsigned': they are signed",
    ),
  ],
)
def test_layer_recipes_that_make_no_sense_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    LayerRecipe(**fields)


def test_a_group_that_does_not_divide_is_refused():
  with pytest.raises(ConfigError, match="group = 24: blocks of 24 do not divide a width of 64"):
    fake_quantize(normal(4, 64), QuantSpec(4, granularity="group", group=24))
  with pytest.raises(ConfigError, match="granularity = 'mx': blocks of 32"):
    fake_quantize(normal(4, 48), MXFP4)
