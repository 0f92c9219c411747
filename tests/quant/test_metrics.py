"""Logged metrics of quantization: by their definitions, and the same however the model is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import STUDY

from beyond_outliers import config
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.bench import hlo
from beyond_outliers.model import linears, transformer
from beyond_outliers.model.forward import make_forward
from beyond_outliers.quant import (
  RECIPES,
  LayerRecipe,
  QuantSpec,
  Recipe,
  dot_general_for,
  fake_quantize,
  metrics,
  quantize_array,
)
from beyond_outliers.quant.rotations import rotate, unrotate
from beyond_outliers.train.program import make_quant_statistics

# Heads are as wide as a rotation's block: see test_model.py.
MODEL = dataclasses.replace(
  STUDY, heads=2, d_head=128, d_model=256, mlp_hidden=256, attention="plain"
)
DRAW = np.random.default_rng(0)
TOKENS = DRAW.integers(0, MODEL.vocab, (4, 13)).astype(np.int32)
BATCH = {"tokens": TOKENS}
QUEST, RTN = RECIPES["quest_w4a4"].default, RECIPES["rtn_w4a4"].default


def params_of(model, seed=1):
  draw = np.random.default_rng(seed)

  def number(path, leaf):
    mean = 0 if leaf.ndim == 3 else -2 if path[-1].key == "log_scale" else 0.5
    return jnp.asarray(draw.normal(mean, 0.1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(number, transformer.shapes(model))


def measured(recipe, params=None, before=None, c=MODEL, backend="jax"):
  model = transformer.Transformer(c, dot_general_for(recipe, backend))
  params = params_of(model) if params is None else params
  before = jax.tree.map(lambda x: 1.01 * x + 0.01, params) if before is None else before
  quant_statistics = make_quant_statistics(make_forward(model, False), c, recipe)
  found = jax.jit(quant_statistics)(params, before, BATCH)
  return {name: float(value) for name, value in found.items()}


def sqnr(x, became):
  return 10 * np.log10(np.sum(np.square(x)) / np.sum(np.square(became - x)))


@pytest.mark.parametrize("operand,axis", [("weights", 0), ("activations", 1)])
def test_four_bits_of_quest_on_normal_numbers(operand, axis):
  """arXiv 2502.05003: half a step beyond the largest level lies 0.73 % of a normal distribution,
  and 0.0115 of it is error."""
  x = np.random.default_rng(3).standard_normal((512, 512), np.float32)
  sums, _ = jax.jit(lambda x: metrics.operand_sums(x, getattr(QUEST, operand), axis))(x)
  assert float(sums.masked / sums.count) == pytest.approx(0.0073, abs=3e-4)
  assert float(sums.error / sums.signal) == pytest.approx(0.0115, abs=2e-4)
  # 2.5139 standard deviations: the largest level.
  assert float(sums.clipped / sums.count) == pytest.approx(0.01194, abs=4e-4)


SPECS = {
  "quest": QUEST.weights,
  "rtn": RTN.weights,
  "int4": RECIPES["int4_w4a4"].weights,
  "lsq": RECIPES["lsq_w4a4"].weights,
  "fp8": RECIPES["fp8"].weights,
  "mxfp4": RECIPES["mxfp4"].weights,
  "nvfp4": RECIPES["nvfp4"].weights,
  "quest 1 bit": RECIPES["quest_w1a1"].weights,
  "lsq unsigned": RECIPES["lsq_w4a4_unsigned"].activations,
  "clip": QuantSpec(3, scale="percentile_99", estimator="clip", rotation="randomized_hadamard"),
}


@pytest.mark.parametrize("name", SPECS)
def test_sums_are_those_of_fake_quantization(name):
  """Its values, and where its gradient vanishes."""
  spec, draw = SPECS[name], np.random.default_rng(4)
  x = (draw.standard_normal((64, 96)) * np.exp(draw.standard_normal((64, 1)))).astype(np.float32)
  scale = jnp.full((1, 1), 0.4) if name.startswith("lsq") else None

  @jax.jit
  def compute(x):
    sums, codes = metrics.operand_sums(x, spec, 0, scale)
    became, back = jax.vjp(lambda x: fake_quantize(x, spec, 0, scale=scale), x)
    # A gradient of ones in the basis that is quantized.
    passed = rotate(back(unrotate(jnp.ones_like(x), spec.rotation, 0))[0], spec.rotation, 0)
    return sums, codes, became, passed, quantize_array(x, spec, 0, scale=scale)

  sums, codes, became, passed, q = compute(x)
  np.testing.assert_allclose(10 * np.log10(sums.signal / sums.error), sqnr(x, became), atol=1e-3)
  assert float(sums.masked) == np.sum(np.abs(passed) < 0.5)
  np.testing.assert_array_equal(codes.astype(np.float32), q.codes.astype(np.float32))
  v = np.float64(rotate(jnp.asarray(x), spec.rotation, 0)) / np.repeat(
    q.scale, 64 // q.scale.shape[0], 0
  )
  assert float(sums.clipped) == np.sum(
    (v > spec.levels.largest * (1 + 1e-6)) | (v < spec.levels.lowest * (1 + 1e-6))
  )
  assert float(sums.count) == x.size


def test_the_largest_number_under_absmax_is_not_clipped():
  """Though it divided by its scale may come out beyond the largest level."""
  x = np.random.default_rng(5).standard_normal((2048, 3)).astype(np.float32)
  assert float(jax.jit(lambda x: metrics.operand_sums(x, QuantSpec(4), 1)[0].clipped)(x)) == 0


def test_what_crosses_a_boundary():
  """Scales follow the weights: all of them doubled are the same codes, all of them negated are
  none."""
  c, recipe = dataclasses.replace(MODEL, blocks=1), RECIPES["quest_w4a4"]
  params = params_of(transformer.Transformer(c))

  @jax.jit
  def of_weights(before):
    return metrics.of_weights(recipe, linears.linears(c, params), linears.linears(c, before))

  def crossed(change):
    return float(of_weights(jax.tree.map(change, params))["quant/weights/crossed"])

  assert crossed(lambda x: x) == crossed(lambda x: 2 * x) == 0
  assert crossed(jnp.negative) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_every_depth_is_measured_under_its_own_rule():
  """Weights of both, by the quantizer itself; activations of the first, whose input is the
  embedding."""
  head = LayerRecipe(QuantSpec(4), QuantSpec(4, granularity="token"))
  recipe = Recipe(
    (("layers/0/.*", QUEST), ("head", head), ("layers/1/attention/.*", None), (".*", RTN))
  )
  model = transformer.Transformer(MODEL, dot_general_for(recipe))
  params, before = params_of(model), params_of(model, seed=2)
  found = measured(recipe, params, before, backend="aqt")

  def of_step(specs, kernels, old):
    """(sqnr, share of codes that changed) of kernels one below the other."""
    became = np.stack(
      [fake_quantize(kernel, spec, 0) for kernel, spec in zip(kernels, specs, strict=True)]
    )
    codes = [
      [
        np.float32(quantize_array(kernel, spec, 0).codes)
        for kernel, spec in zip(tree, specs, strict=True)
      ]
      for tree in (kernels, old)
    ]
    return sqnr(kernels, became), np.mean(np.not_equal(*codes))

  def assert_found(kind, expected):
    np.testing.assert_allclose(
      [found[f"quant/weights/{value}/{kind}"] for value in ("sqnr", "crossed")], expected, rtol=1e-4
    )

  up, old_up = (tree["layers"]["mlp"]["up"]["kernel"] for tree in (params, before))
  assert_found("mlp/up", of_step((QUEST.weights, RTN.weights), up, old_up))
  q, old_q = (tree["layers"]["attention"]["q"]["kernel"][:1] for tree in (params, before))
  assert_found("attention/q", of_step((QUEST.weights,), q, old_q))
  assert_found(
    "head", of_step((head.weights,), params["embedding"].T[None], before["embedding"].T[None])
  )
  x = np.asarray(params["embedding"])[TOKENS].reshape(-1, MODEL.d_model)
  np.testing.assert_allclose(
    found["quant/activations/sqnr/attention/q"],
    sqnr(x, fake_quantize(x, QUEST.activations)),
    rtol=1e-4,
  )
  assert 10 < found["quant/activations/sqnr/head"] < 25


def test_only_operands_that_are_quantized_have_rows():
  names = measured(RECIPES["rtn_w4a16"], c=dataclasses.replace(MODEL, blocks=1))
  assert len(names) == 4 * len(linears.linear_paths(MODEL)) + 1
  assert all(name.startswith("quant/weights/") for name in names)


def test_scales_that_only_some_depths_learn():
  """What fills the places of the others is in nobody's way."""
  recipe = Recipe((("layers/1/mlp/.*", RECIPES["lsq_w4a4"].default), (".*", None)))
  params = jax.jit(
    lambda: transformer.init(transformer.Transformer(MODEL, dot_general_for(recipe)), 0)
  )()
  assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params))
  found = measured(recipe, params)
  assert len(found) == 2 * 7 + 1 and all(map(np.isfinite, found.values()))


FAMILIES = ["quest_w4a4"]
SLOW = ["lsq_w4a4", "rtn_w8a8", "fp8", "mxfp4", "nvfp4", "quest_w1.58a1.58", "int8_gradients"]


@pytest.mark.parametrize(
  "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_scanned_unrolled_and_sharded_are_one(name):
  """In float64, as in test_model.py: unrolled and rematerialised on one device, scanned on eight.
  And no device ever holds another's weights."""
  recipe, wide = (
    Recipe(((".*", RECIPES[name].default),)),
    dataclasses.replace(MODEL, dtype="float64"),
  )
  model = transformer.Transformer(wide, dot_general_for(recipe, "jax"))
  mesh = mesh_lib.make_mesh(config.Mesh(2, 2, 2))
  shardings = mesh_lib.shardings(transformer.boxed_shapes(model), mesh)
  params = params_of(model)
  before = jax.tree.map(lambda x: 1.01 * x + 0.01, params)
  with jax.enable_x64(True):
    expected = measured(recipe, params, before, dataclasses.replace(wide, unroll=0, remat="full"))
    with mesh_lib.use(mesh):
      of_all = jax.jit(
        make_quant_statistics(make_forward(model, False), wide, recipe),
        in_shardings=(shardings, shardings, None),
      )
      sharded = {key: float(value) for key, value in of_all(params, before, BATCH).items()}
  kinds = [*linears.linear_paths(MODEL), "head"]
  assert set(expected) == {
    f"quant/{operand}/{value}/{kind}"
    for operand in ("weights", "activations")
    for kind in kinds
    for value in ("sqnr", "masked", "clipped")
  } | {f"quant/weights/crossed/{kind}" for kind in kinds} | {"quant/weights/crossed"}
  assert all(map(np.isfinite, expected.values()))
  assert sharded == pytest.approx(expected, rel=1e-4, abs=1e-6)

  with mesh_lib.use(mesh):
    of_weights = jax.jit(
      lambda *trees: metrics.of_weights(recipe, *(linears.linears(MODEL, t) for t in trees)),
      in_shardings=(shardings, shardings),
    )
    program = hlo.instructions(of_weights.lower(params, before).compile().as_text())
  # Scales, one per output channel of the widest layer, are the most that devices tell each other.
  assert max(one.bytes for one in program if hlo.collective(one)) <= 4 * MODEL.mlp_hidden
