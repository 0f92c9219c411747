"""Products of quantized operands: both backends against an independent reference, and against each
other on every recipe."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding, PartitionSpec

from beyond_outliers import config, mesh
from beyond_outliers.quant import RECIPES, LayerRecipe, QuantSpec, Recipe, dot_general_for
from beyond_outliers.quant.backends import aqt as aqt_backend
from beyond_outliers.quant.backends import jax as jax_backend
from beyond_outliers.quant.dot import BACKENDS
from beyond_outliers.quant.quantizers import fake_quantize

TOKENS, INPUTS, OUTPUTS = 48, 256, 32
KERNEL, EMBEDDING = 0, 1  # which axis of the weights is summed over
QUEST_158 = RECIPES["quest_w1.58a1.58"].default


def problem(w_axis=KERNEL, dtype=np.float32):
  draw = np.random.default_rng(0)
  x, w, g = (
    draw.standard_normal(shape).astype(dtype)
    for shape in ((TOKENS, INPUTS), (INPUTS, OUTPUTS), (TOKENS, OUTPUTS))
  )
  return x, w if w_axis == KERNEL else w.T, g


@functools.partial(jax.jit, static_argnames=("backend", "layer", "w_axis"))
def forward_and_gradients(x, w, g, layer, backend, w_axis=KERNEL, key=None):
  options = {} if key is None else {"key": key}
  y, pullback = jax.vjp(lambda x, w: BACKENDS[backend](x, w, w_axis, layer, **options), x, w)
  return y, *pullback(g.astype(y.dtype))


def quest(bits):
  def spec(granularity):
    grid = "ternary" if bits == 1.585 else "midrise"
    return QuantSpec(bits, grid, "gaussian", granularity, rotation="hadamard", estimator="trust")

  return LayerRecipe(spec("channel"), spec("token"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", reference.BITS)
def test_quest_is_the_published_formula(bits, backend):
  """arXiv 2502.05003: forward and both gradients, to 1e-6 of the largest number."""
  x, w, g = problem()
  expected = reference.layer(
    *(a.astype(np.float64) for a in (x, w, g)), lambda rows: reference.quest(rows, bits), block=128
  )
  for ours, theirs in zip(
    forward_and_gradients(x, w, g, quest(bits), backend), expected, strict=True
  ):
    reference.assert_near(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("w_axis", [KERNEL, EMBEDDING])
def test_round_to_nearest_and_the_embeddings_orientation(bits, w_axis, backend):
  x, w, g = problem(w_axis)
  as_kernel = (x, w if w_axis == KERNEL else w.T, g)
  y, dx, dw = reference.layer(
    *(a.astype(np.float64) for a in as_kernel), lambda rows: reference.round_to_nearest(rows, bits)
  )
  ours = forward_and_gradients(x, w, g, RECIPES[f"rtn_w{bits}a{bits}"].default, backend, w_axis)
  for a, b in zip(ours, (y, dx, dw if w_axis == KERNEL else dw.T), strict=True):
    reference.assert_near(a, b)


NEAREST_GRADIENTS = LayerRecipe(
  QuantSpec(8), QuantSpec(8, granularity="token"), QuantSpec(8, granularity="token")
)
MORE = {
  "unquantized backward": LayerRecipe(
    QuantSpec(4), QuantSpec(4, granularity="token"), backward="unquantized"
  ),
  "int8 gradients to nearest": NEAREST_GRADIENTS,
  "absmax_edge, clip": LayerRecipe(
    *(
      QuantSpec(4, scale="absmax_edge", granularity=name, estimator="clip")
      for name in ("channel", "token")
    )
  ),
  "clip search": LayerRecipe(QuantSpec(3, scale="mse")),
  "two's complement, a tensor": LayerRecipe(
    *2 * [QuantSpec(4, "twos_complement", "percentile_99", "tensor", estimator="clip")]
  ),
  "float8, a tensor": LayerRecipe(
    *2 * [QuantSpec(8, "e4m3", granularity="tensor")], QuantSpec(8, "e5m2", granularity="tensor")
  ),
  "without a sign": LayerRecipe(
    QuantSpec(4), QuantSpec(4, "unsigned", granularity="token", estimator="clip")
  ),
  "activations alone": LayerRecipe(
    None, QuantSpec(4, "midrise", "gaussian", "token", estimator="trust", rotation="hadamard")
  ),
}
BOTH = {
  **{
    name: recipe.default
    for name, recipe in RECIPES.items()
    if recipe.default and aqt_backend.expresses(recipe.default)
  },
  **MORE,
}


@pytest.mark.parametrize("name", BOTH)
def test_both_backends_are_one(name):
  """On every recipe that AQT expresses; without a key, stochastic rounding is to nearest."""
  x, w, g = problem()
  ours, aqts = (forward_and_gradients(x, w, g, BOTH[name], backend) for backend in ("jax", "aqt"))
  for a, b in zip(ours, aqts, strict=True):
    reference.assert_near(a, b)


PAIRS = [
  (name, backend)
  for name, recipe in RECIPES.items()
  for backend in BACKENDS
  if recipe.default and (backend == "jax" or aqt_backend.expresses(recipe.default))
]


def learned(layer):
  """The options that a backend needs of learned scales."""
  return {"scales": 2 * (jnp.full((1, 1), 0.3),)} if layer.weights.scale == "learned" else {}


@pytest.mark.parametrize("name,backend", PAIRS)
def test_a_token_is_what_it_is_whatever_stands_beside_it(name, backend):
  """Not a bit changes if others, such as later tokens, other windows or padding, are a hundred
  times as large."""
  layer = RECIPES[name].default
  x, w, _ = problem()
  product = jax.jit(lambda x: BACKENDS[backend](x, w, KERNEL, layer, **learned(layer)))
  np.testing.assert_array_equal(product(x)[:5], product(np.concatenate([x[:5], 100 * x[5:]]))[:5])


@pytest.mark.parametrize("name,backend", PAIRS)
def test_what_is_not_finite_stays_so(name, backend):
  """Of an input in the outputs of its token, of a weight in its output."""
  layer = RECIPES[name].default
  product = jax.jit(lambda x, w: BACKENDS[backend](x, w, KERNEL, layer, **learned(layer)))
  for number in (np.nan, np.inf, -np.inf):
    x, w, _ = problem()
    x[3, 5] = number
    assert not np.isfinite(product(x, w)[3]).any()
    x, w, _ = problem()
    w[5, 3] = number
    assert not np.isfinite(product(x, w)[:, 3]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_number_under_absmax_keeps_its_gradient(backend):
  """Even though its quotient by the scale may be rounded beyond the largest level."""
  x = np.random.default_rng(1).standard_normal((2048, 64)).astype(np.float32)
  layer = LayerRecipe(None, QuantSpec(4, granularity="token", estimator="clip"))
  dx = forward_and_gradients(
    x, np.ones((64, 1), np.float32), np.ones((2048, 1), np.float32), layer, backend
  )[1]
  np.testing.assert_array_equal(dx, 1)


def test_what_aqt_cannot_express_goes_through_jax():
  unable = {
    name
    for name, recipe in RECIPES.items()
    if recipe.default and not aqt_backend.expresses(recipe.default)
  }
  integers = {name for name in RECIPES if re.match(r"int\d_w", name)}
  others = {"rtn_w4a16_g128", "lsq_w4a4", "lsq_w4a4_unsigned", "mxfp4", "nvfp4"}
  assert unable == integers | others
  for name, recipe in RECIPES.items():
    made = dot_general_for(recipe, "aqt")("layers/0/mlp/up")
    assert (made().backend if made else None) == (
      None if name == "none" else "jax" if name in unable else "aqt"
    )


@pytest.mark.parametrize("name", ["rtn_w4a16_g128", "mxfp4", "nvfp4", "int4_w4a4"])
def test_what_aqt_cannot_express_multiplies_as_fake_quantized_operands(name):
  x, w, g = problem()
  layer = RECIPES[name].default

  @jax.jit
  def fake(x, w, g):
    def product(x, w):
      xq = x if layer.activations is None else fake_quantize(x, layer.activations, 1)
      return jnp.matmul(xq, fake_quantize(w, layer.weights, 0), precision="highest")

    y, pullback = jax.vjp(product, x, w)
    return y, *pullback(g)

  for a, b in zip(forward_and_gradients(x, w, g, layer, "jax"), fake(x, w, g), strict=True):
    reference.assert_near(a, b)


@pytest.mark.parametrize("name", ["lsq_w4a4", "lsq_w4a4_unsigned"])
def test_learned_scales_get_the_gradient_that_fake_quantization_gives(name):
  x, w, g = problem()
  x = x if name == "lsq_w4a4" else np.maximum(x, 0) ** 2
  layer = RECIPES[name].default
  sx, sw = jnp.full((1, 1), 0.3), jnp.full((1, 1), 0.4)

  def ours(x, w, sx, sw):
    return jnp.sum(g * jax_backend.dot_general(x, w, 0, layer, scales=(sx, sw)))

  def fake(x, w, sx, sw):
    xq, wq = (
      fake_quantize(x, layer.activations, scale=sx),
      fake_quantize(w, layer.weights, scale=sw),
    )
    return jnp.sum(g * jnp.matmul(xq, wq, precision="highest"))

  grads, (dx, dw, ds_x, ds_w) = (
    jax.jit(jax.grad(f, (0, 1, 2, 3)))(x, w, sx, sw) for f in (ours, fake)
  )
  # What counts is a token's features, not all of the tokens' (arXiv 1902.08153, section 2.2).
  for a, b in zip(grads, (dx, dw, ds_x * TOKENS**0.5, ds_w), strict=True):
    reference.assert_near(a, b, 1e-5)


def products(layer, backend, dtype=jnp.float32):
  """The operand types of all products that are lowered, rotations aside."""
  x, w, g = problem()
  key = jax.random.key(0) if "stochastic" in str(layer) else None
  text = forward_and_gradients.lower(
    jnp.asarray(x, dtype), jnp.asarray(w), jnp.asarray(g), layer, backend, key=key
  ).as_text()
  operands = [
    line.split(" : (")[1].split(")")[0]
    for line in text.splitlines()
    if "stablehlo.dot_general" in line
  ]
  return [
    "".join("i" if "i8>" in part else "b" if "bf16>" in part else "f" for part in pair.split(", "))
    for pair in operands
    if "128x128x" not in pair
  ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
  "layer,expected",
  [
    (RECIPES["quest_w4a4"].default, ["ii", "ff", "ff"]),
    (QUEST_158, ["ii", "ff", "ff"]),
    (RECIPES["rtn_w8a8"].default, ["ii", "ff", "ff"]),
    (RECIPES["rtn_w4a16"].default, ["ff"] * 3),
    (RECIPES["quest_w8a8"].default, ["ff"] * 3),
    (RECIPES["int8_gradients"].default, ["ii"] * 3),
  ],
)
def test_which_products_are_integer(layer, expected, backend):
  assert products(layer, backend) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_products_have_bfloat16_operands_and_lose_only_what_they_must(backend):
  """Codes are exact in bfloat16, and rotations and scales are float32: the forward pass sees x's
  own rounding and no more."""
  layer = RECIPES["quest_w4a4"].default
  assert products(layer, backend, jnp.bfloat16) == ["ii", "bb", "bb"]
  x, w, g = problem()
  narrow = jnp.asarray(x, jnp.bfloat16)
  y, dx, dw = forward_and_gradients(narrow, w, g, layer, backend)
  exact = forward_and_gradients(np.asarray(narrow, np.float32), w, g, layer, backend)
  assert y.dtype == dw.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
  reference.assert_near(y, exact[0])
  for a, b in zip((dx, dw), exact[1:], strict=True):
    assert np.linalg.norm(np.asarray(a, np.float32) - b) < 6e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_integer_products_are_exact(bits):
  """y over the scales is the whole number that the codes make, in int64."""

  def spec(granularity):
    return QuantSpec(bits, "midrise", granularity=granularity)

  def unit(a):
    return np.float32(np.abs(a).max() / np.float32(2**bits - 1))

  def codes(a):
    return np.rint(np.asarray(fake_quantize(a, layer.weights)) / unit(a)).astype(np.int64)

  x, w, g = problem()
  layer = LayerRecipe(spec("tensor"), spec("tensor"))
  y, _, _ = forward_and_gradients(x, w, g, layer, "jax")
  np.testing.assert_array_equal(
    np.rint(np.asarray(y, np.float64) / (float(unit(x)) * unit(w))), codes(x) @ codes(w)
  )


@pytest.mark.parametrize(
  "name", ["rtn_w4a4", "quest_w4a4", "mxfp4", "nvfp4", "fp8", "int8_gradients"]
)
def test_a_recipe_says_whether_its_gradients_depend_on_how_a_batch_is_cut(name):
  x, w, g = problem()
  _, _, whole = forward_and_gradients(x, w, g, RECIPES[name].default, "jax")
  halves = zip(np.split(x, 2), np.split(g, 2), strict=True)
  parts = [forward_and_gradients(x, w, g, RECIPES[name].default, "jax")[2] for x, g in halves]
  differ = np.max(np.abs(sum(parts) - whole)) > 1e-5 * np.max(np.abs(whole))
  assert differ == RECIPES[name].sees_batches


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_gradients_are_unbiased(backend):
  x, w, g = problem()
  g[:, ::4] *= 10
  layer = RECIPES["int8_gradients"].default
  exact = forward_and_gradients(x, w, g, RECIPES["rtn_w8a8"].default, backend)
  draws = jax.lax.map(
    lambda key: forward_and_gradients(x, w, g, layer, backend, key=key)[1:],
    jax.random.split(jax.random.key(0), 400),
  )
  for each, b in zip(draws, exact[1:], strict=True):
    error, mean_error = (np.linalg.norm(a - b) / np.linalg.norm(b) for a in (each[0], each.mean(0)))
    assert 1e-3 < error < 0.05
    assert mean_error < 0.1 * error


@pytest.mark.parametrize(
  "name,backend",
  [
    *((name, "aqt") for name in ("quest_w4a4", "rtn_w8a8", "fp8", "int8_gradients")),
    ("int8_gradients", "jax"),
  ],
)
def test_sharded_and_rematerialised_are_one(name, backend):
  """Of the layer whose contraction is split, with a key: the same numbers are drawn on eight
  devices, and drawn again."""
  layer, key, operands = RECIPES[name].default, jax.random.key(0), problem()
  expected = forward_and_gradients(*operands, layer, backend, key=key)
  grid = mesh.make_mesh(config.Mesh(2, 2, 2))
  split = (("data", "fsdp"), "model"), ("model", "fsdp"), (("data", "fsdp"), None)
  sharded = [
    jax.device_put(x, NamedSharding(grid, PartitionSpec(*axes)))
    for x, axes in zip(operands, split, strict=True)
  ]

  @jax.jit
  def rematerialised(x, w, g):
    y, pullback = jax.vjp(
      jax.checkpoint(lambda x, w: BACKENDS[backend](x, w, KERNEL, layer, key=key)), x, w
    )
    return y, *pullback(g)

  eight = forward_and_gradients(*sharded, layer, backend, key=key)
  assert len(eight[0].sharding.device_set) == 8
  for ours in (eight, rematerialised(*operands)):
    for a, b in zip(ours, expected, strict=True):
      reference.assert_near(a, b, 2e-6)


def test_layers_of_equal_recipes_share_one_maker():
  makers = dot_general_for(Recipe((("head", None), (".*", quest(4)))), "jax")
  assert (
    makers("layers/0/mlp/up")
    is makers("layers/1/attention/q")
    is dot_general_for(RECIPES["quest_w4a4"], "jax")("x")
  )
  assert makers("head") is None
