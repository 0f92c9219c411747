"""Quantization after training: methods against numpy, what they leave unchanged, and the contract
that their results obey."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import STUDY

from beyond_outliers import config
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.errors import ConfigError
from beyond_outliers.model import transformer
from beyond_outliers.quant import ptq, qmatrix, quantizers, rotations
from beyond_outliers.quant.dot import dot_general_for
from beyond_outliers.quant.ptq import calibration, gptq, rotation_fusion, smoothing
from beyond_outliers.quant.ptq.calibration import Inputs
from beyond_outliers.quant.recipes import RECIPES, Recipe
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec

MODEL = dataclasses.replace(
  STUDY, blocks=3, heads=2, kv_heads=1, d_head=32, d_model=64, mlp_hidden=128, attention="plain"
)
DRAW = np.random.default_rng(0)
TOKENS = DRAW.integers(0, MODEL.vocab, (3, 24)).astype(np.int32)
BATCHES = [{"tokens": DRAW.integers(0, MODEL.vocab, (2, 24)).astype(np.int32)} for _ in range(3)]
W4A16, W4A4 = RECIPES["rtn_w4a16"], RECIPES["rtn_w4a4"]


def plain(**change):
  model = transformer.Transformer(dataclasses.replace(MODEL, **change))
  draw = np.random.default_rng(1)
  return model, jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0.5 if leaf.ndim < 3 else 0, 0.1, leaf.shape), leaf.dtype),
    transformer.shapes(model),
  )


def logits(model, params, tokens=TOKENS):
  return jax.jit(lambda params: model.apply({"params": params}, tokens))(params)


def correlated(tokens, width):
  """Inputs whose features are neither independent nor of one size."""
  mixed = DRAW.normal(size=(tokens, width)) @ DRAW.normal(size=(width, width))
  return (mixed * np.exp(DRAW.normal(size=width))).astype(np.float32)


def reference_gptq(w_KxO, gram_KxK, scale_KxO, order, damping):
  """Algorithm 1 of arXiv 2210.17323 as it is written, a row at a time, in float64, on the grid -7
  ... 7."""
  w, gram, scale = (np.asarray(x, np.float64)[order] for x in (w_KxO, gram_KxK, scale_KxO))
  gram = gram[:, order] + damping * np.mean(np.diag(gram_KxK)) * np.eye(len(w))
  inverse = np.linalg.inv(gram)
  codes = np.zeros_like(w)
  for row in range(len(w)):
    codes[row] = np.clip(np.round(w[row] / scale[row]), -7, 7)
    error = (w[row] - codes[row] * scale[row]) / inverse[row, row]
    w -= np.outer(inverse[:, row], error)
    inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]  # one unknown less
    inverse[row, row] = 1.0
  result = np.empty_like(codes)
  result[order] = codes
  return result


@pytest.mark.parametrize("name,damping", [("gptq", 0.01), ("gptq", 0.3), ("gptq_in_order", 0.01)])
@pytest.mark.parametrize(
  "spec", [QuantSpec(4), QuantSpec(4, granularity="group", group=16)], ids=["channel", "group"]
)
def test_gptq_is_the_papers_algorithm(name, damping, spec):
  K, outputs = 160, 24  # more rows than a block of 128, and no multiple of it
  x, w = correlated(500, K), DRAW.normal(size=(K, outputs)).astype(np.float32)
  gram = x.T @ x / len(x)
  with jax.enable_x64(True):
    w, gram = jnp.asarray(w, jnp.float64), jnp.asarray(gram, jnp.float64)
    scale = quantizers.scale_of(w, spec, 0)
    codes = gptq.ROUNDERS[name].round(w, scale, spec, gram, damping).codes
  order = np.argsort(-np.diag(gram), kind="stable") if name == "gptq" else np.arange(K)
  expected = reference_gptq(w, gram, np.repeat(scale, K // len(scale), 0), order, damping)
  np.testing.assert_array_equal(codes, expected)


def test_gptq_moves_the_output_less_than_rounding_to_nearest():
  x, w = correlated(500, 128), DRAW.normal(size=(128, 32)).astype(np.float32)
  spec, gram = QuantSpec(4), jnp.asarray(x.T @ x / len(x))
  scale = quantizers.scale_of(jnp.asarray(w), spec, 0)

  def error(name):
    codes = gptq.ROUNDERS[name].round(jnp.asarray(w), scale, spec, gram).codes
    return np.linalg.norm(x @ (np.asarray(codes) * scale - w))

  assert error("gptq") < 0.9 * error("nearest") and error("gptq_in_order") < 0.9 * error("nearest")


def test_inputs_that_are_always_zero_leave_their_rows_rounded_alone():
  x, w = correlated(300, 64), DRAW.normal(size=(64, 8)).astype(np.float32)
  x[:, 5] = 0
  spec, gram = QuantSpec(4), jnp.asarray(x.T @ x / len(x))
  scale = quantizers.scale_of(jnp.asarray(w), spec, 0)
  codes = np.asarray(gptq.gptq(jnp.asarray(w), scale, spec, gram).codes)
  alone = np.asarray(gptq.round_to_nearest(jnp.asarray(w), scale, spec, None).codes)
  np.testing.assert_array_equal(codes[5], alone[5])
  np.testing.assert_array_equal(
    gptq.gptq(jnp.asarray(w), scale, spec, jnp.zeros_like(gram)).codes, alone
  )


def test_rows_that_nothing_compensates_get_the_codes_of_rounding_to_nearest():
  """Also where the largest number of a channel is negative, halfway between two codes."""
  w, spec = jnp.asarray(DRAW.normal(size=(8, 512)), jnp.float32), RECIPES["int4_w4a16"].weights
  assert np.mean(np.min(w, 0) < -np.max(w, 0)) > 0.4

  @jax.jit
  def both(w, gram):
    scale = quantizers.scale_of(w, spec, 0)
    return [each(w, scale, spec, gram).codes for each in (gptq.gptq, gptq.round_to_nearest)]

  np.testing.assert_array_equal(*both(w, jnp.eye(8)))


@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_smoothquant_is_the_papers_equation(alpha):
  x, w = correlated(200, 32), DRAW.normal(size=(32, 8)).astype(np.float32)
  s = np.abs(x).max(0) ** alpha / np.abs(w).max(1) ** (1 - alpha)  # X / s, W · s
  inputs = Inputs(np.abs(x).max(0), np.abs(x).mean(0), x.T @ x / len(x))
  np.testing.assert_allclose(
    smoothing.smoothquant(jnp.asarray(w), inputs, W4A4.default, alpha), 1 / s, rtol=1e-5
  )


def test_awq_takes_the_exponent_of_least_output_error():
  x, w = correlated(200, 32), DRAW.normal(size=(32, 8)).astype(np.float32)
  inputs, layer = (
    Inputs(np.abs(x).max(0), np.abs(x).mean(0), jnp.asarray(x.T @ x / len(x))),
    W4A16.default,
  )
  errors = {}
  for alpha in np.arange(20) / 20:
    s = np.abs(x).mean(0) ** alpha
    s = s / np.sqrt(s.max() * s.min())
    scale = np.abs(w * s[:, None]).max(0) / 7
    errors[alpha] = (
      np.mean(np.sum((x @ (np.round(w * s[:, None] / scale) * scale / s[:, None] - w)) ** 2, 1)),
      1 / s,
    )
  best = min(errors, key=errors.get)
  assert best > 0 and errors[best][0] < errors[0][0]
  smooth = smoothing.awq(jnp.asarray(w), inputs, layer)
  np.testing.assert_allclose(smooth, errors[best][1], rtol=1e-4)
  np.testing.assert_allclose(
    smoothing.output_error(jnp.asarray(w), smooth, inputs, layer), errors[best][0], rtol=1e-3
  )


@pytest.mark.parametrize("name", ["none", "hadamard", "smooth", "both"])
def test_what_prepares_a_matrix_leaves_the_product_as_it_was(name):
  """Rotation and smoothing of both operands, with nothing rounded: codes are the numbers
  themselves."""
  x, w = correlated(20, 64), DRAW.normal(size=(64, 8)).astype(np.float32)
  rotation = "hadamard" if name in ("hadamard", "both") else "none"
  layer = LayerRecipe(QuantSpec(8, rotation=rotation))
  smooth = (
    jnp.asarray(np.exp(DRAW.normal(size=64)), jnp.float32) if name in ("smooth", "both") else None
  )
  weight = qmatrix.QuantizedMatrix(
    qmatrix.in_quantized_basis(jnp.asarray(w), layer, smooth), jnp.ones((1, 1)), smooth
  )
  expected = x.astype(np.float64) @ w
  tolerance = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(
    qmatrix.matmul(jnp.asarray(x), weight, layer), expected, rtol=0, atol=tolerance
  )
  np.testing.assert_allclose(
    x @ np.asarray(qmatrix.reconstruct(weight, layer), np.float64), expected, rtol=0, atol=tolerance
  )
  # The Gram matrix follows the inputs into the basis of the matrix.
  rotated = np.asarray(
    rotations.rotate(jnp.asarray(x if smooth is None else x * smooth), rotation, 1), np.float64
  )
  gram = rotated.T @ rotated
  np.testing.assert_allclose(
    qmatrix.gram_in_quantized_basis(jnp.asarray(x.T @ x), layer, smooth),
    gram,
    rtol=0,
    atol=1e-5 * gram.max(),
  )


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"norm_placement": "pre"},
    {"norm_placement": "pre", "tied": False, "mlp": "swiglu"},
    {"heads": 3, "d_head": 24, "d_model": 72, "norm_placement": "pre"},
    {"norm_gain": "single"},
    {"norm_gain": "single", "norm_placement": "pre", "tied": False, "mlp": "swiglu"},
  ],
  ids=str,
)
def test_fused_rotations_leave_the_function_as_it_was(change):
  model, params = plain(**change)
  rotated_model, rotated, _ = rotation_fusion.fuse(model, params)
  exact = logits(model, params)
  np.testing.assert_allclose(
    logits(rotated_model, rotated), exact, rtol=0, atol=1e-5 * float(jnp.abs(exact).max())
  )
  assert not np.allclose(
    rotated["layers"]["attention"]["o"]["kernel"],
    params["layers"]["attention"]["o"]["kernel"],
    atol=0.1,
  )


@pytest.mark.parametrize(
  "placement, gain", [("pre", "channel"), ("post", "channel"), ("post", "single")]
)
def test_fused_rotations_leave_out_those_at_run_time_that_they_replace(placement, gain):
  model, params = plain(norm_placement=placement, norm_gain=gain)
  recipe = ptq.quantize(model, params, W4A4, "quarot").recipe
  online = {
    path.split("/", 2)[-1]
    for path in model.contractions()
    if (layer := recipe.layer(path)) and layer.rotation != "none"
  }
  assert online == (
    {"mlp/down"}
    if placement == "pre" or gain == "single"
    else {"mlp/down", "mlp/up", "attention/q", "attention/k", "attention/v"}
  )


def test_a_recipe_that_rotates_is_not_rotated_twice():
  """Two rotations of o's inputs by the same blocks would be none."""
  model, params = plain(heads=1, kv_heads=1, d_head=128, d_model=128, mlp_hidden=256)
  recipe = ptq.quantize(model, params, RECIPES["quest_w4a4"], "quarot").recipe
  assert (
    recipe.layer("layers/0/attention/o").rotation == "none"
    and recipe.layer("layers/0/mlp/up").rotation == "hadamard"
  )


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("recipe", ["rtn_w4a4", "rtn_w4a16_g128", "mxfp4", "quest_w4a4"])
def test_rounding_to_nearest_is_what_training_under_the_recipe_computes(recipe):
  model, params = plain(heads=4, d_model=128, mlp_hidden=256)
  q = ptq.quantize(model, params, RECIPES[recipe])
  trained = model.clone(dot_general_for=dot_general_for(RECIPES[recipe], "jax"))
  np.testing.assert_array_equal(logits(q.model, q.params), logits(trained, params))


@pytest.mark.parametrize(
  "method",
  [
    name
    if name in ("smoothquant", "awq", "quarot+gptq")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in ptq.METHODS
  ],
)
def test_every_kind_of_method_approaches_the_model_as_bits_grow(method):
  model, params = plain()
  exact = logits(model, params)

  def error(bits):
    recipe = Recipe(
      (("head", None), (".*", LayerRecipe(QuantSpec(bits), QuantSpec(bits, granularity="token"))))
    )
    q = ptq.quantize(model, params, recipe, method, BATCHES)
    return float(jnp.linalg.norm(logits(q.model, q.params) - exact) / jnp.linalg.norm(exact))

  four, eight = error(4), error(8)
  assert four < 0.25, f"{method}: 4 bits change the logits by a share of {four:.3f}"
  assert eight < 0.2 * four, (
    f"{method}: four more bits leave a share of {eight / four:.3f} of the error, not a fifth"
  )


def test_later_blocks_of_gptq_see_quantized_inputs():
  """The last block's codes differ from those with the earlier blocks in full precision."""
  model, params = plain()
  q = ptq.quantize(model, params, W4A4, "gptq", BATCHES)
  rules = (("layers/[01]/.*|head", None), (".*", W4A4.default))
  again = ptq.quantize(model, params, Recipe(rules), "gptq", BATCHES)
  ours, alone = (
    q.params["layers"]["mlp"]["up"]["kernel"].codes[2],
    again.params["layers"]["mlp"]["up"]["kernel"].codes[2],
  )
  assert np.mean(ours != alone) > 0.01


@pytest.mark.parametrize(
  "method,gram,runs", [("smoothquant", False, 0), ("awq", True, 0), ("gptq", True, 2)]
)
def test_every_block_runs_once_or_twice_a_batch(method, gram, runs, monkeypatch):
  """Not once for every block behind it; and Gram matrices are only made where something reads
  them."""
  model, params = plain()
  calls = {"run_block": [], "_see_block": []}

  def count(name, function):
    monkeypatch.setattr(
      calibration, name, lambda module, *rest: calls[name].append(rest) or function(module, *rest)
    )

  count("run_block", calibration.run_block)
  count("_see_block", calibration._see_block)
  ptq.quantize(model, params, W4A16, method, BATCHES)
  assert len(calls["_see_block"]) == MODEL.blocks * len(BATCHES) and len(
    calls["run_block"]
  ) == runs * len(BATCHES)
  assert {asked for asked, *_ in calls["_see_block"]} == {gram}
  stream = calibration.Stream(model, params, BATCHES)
  watched = model.clone(dot_general_for=calibration.watched).block(0)
  seen = stream.see(
    calibration.Stage(watched, jax.tree.map(lambda x: x[0], params["layers"])), gram=gram, run=False
  )
  assert {inputs.gram_KxK is not None for inputs in seen.values()} == {gram}


def test_a_methods_numbers_are_part_of_its_name():
  ours = dataclasses.replace(ptq.METHODS["smoothquant+gptq"], alpha=0.75, damping=0.1)
  assert ptq.method_named("smoothquant(alpha=0.75)+gptq(damping=1e-1)") == ours
  model, params = plain()
  q, nearest = (
    ptq.quantize(model, params, W4A16, name, BATCHES) for name in ("gptq(damping=1e12)", "rtn")
  )
  assert q.method == "gptq(damping=1e12)"
  for a, b in zip(jax.tree.leaves(q.params), jax.tree.leaves(nearest.params), strict=True):
    np.testing.assert_array_equal(a, b)  # inputs that are drowned in noise tell nothing
  smoothed = ptq.quantize(model, params, W4A16, "smoothquant(alpha=0)", BATCHES).params["layers"][
    "mlp"
  ]["up"]["kernel"]
  largest = jnp.max(jnp.abs(params["layers"]["mlp"]["up"]["kernel"]), axis=2)
  np.testing.assert_allclose(smoothed.smooth, largest, rtol=1e-6)


@pytest.mark.parametrize(
  "name,message",
  [
    ("gptw(damping=1)", "did you mean 'gptq'"),
    ("gptq(alpha=0.5)", r"gptq takes \(damping=NUMBER\) once, not 'alpha'"),
    ("rtn(damping=1)", "rtn takes no numbers"),
    ("gptq(damping=1)(damping=2)", "once"),
    ("gptq(damping)", "as in smoothquant"),
    ("gptq(damping=/)", "as in smoothquant"),
    ("gptq(damping=1-1)", "could not convert"),
    ("gptq(damping=0)", "damping = 0.0: expected a number above 0"),
    ("gptq_mse(damping=1e999)", "damping = inf: expected"),
    ("smoothquant(alpha=2)", "alpha = 2.0: expected a fraction, 0 to 1"),
  ],
)
def test_numbers_that_a_method_does_not_take_are_refused(name, message):
  with pytest.raises(ConfigError, match=f"--methods = .*{message}"):
    ptq.method_named(name, "--methods")


def test_what_is_not_sequential_sees_every_block_in_full_precision():
  model, params = plain()
  smooth = (
    ptq.quantize(model, params, W4A4, "smoothquant", BATCHES)
    .params["layers"]["mlp"]["up"]["kernel"]
    .smooth
  )
  watched, tokens = (
    model.clone(dot_general_for=calibration.watched),
    np.concatenate([batch["tokens"] for batch in BATCHES]),
  )
  seen = watched.apply({"params": params}, tokens, mutable="intermediates")[1]["intermediates"][
    "layers"
  ]["mlp"]["up"]
  ((x_NxTxK,),) = jax.tree.leaves(seen, is_leaf=lambda node: isinstance(node, tuple))
  for depth, w_KxO in enumerate(params["layers"]["mlp"]["up"]["kernel"]):
    expected = smoothing.smoothquant(
      w_KxO, Inputs(jnp.abs(x_NxTxK[depth]).max(0), None, None), W4A4.default
    )
    np.testing.assert_allclose(smooth[depth], expected, rtol=1e-5)


def test_calibration_is_the_mean_over_all_batches():
  model, params = plain()
  together = [{"tokens": np.concatenate([batch["tokens"] for batch in BATCHES])}]
  one, many = (
    ptq.quantize(model, params, W4A16, "awq", batches).params for batches in (together, BATCHES)
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-4)


def test_rules_over_depths_share_a_stack():
  """Some layers of a stack in codes of other widths, some left whole: each as its own rule says."""
  model, params = plain()
  layer = W4A4.default
  group = LayerRecipe(QuantSpec(8, granularity="group", group=16))
  recipe = Recipe((("head|layers/0/.*", None), ("layers/1/mlp/.*", group), (".*", layer)))
  q = ptq.quantize(model, params, recipe)
  trained = model.clone(dot_general_for=dot_general_for(recipe, "jax"))
  np.testing.assert_allclose(logits(q.model, q.params), logits(trained, params), atol=2e-5)
  assert q.params["layers"]["mlp"]["up"]["kernel"].codes.dtype == jnp.float32


def test_a_depth_in_a_stack_that_quantizes_its_inputs_alone():
  """Rotated inputs meet a rotated matrix, also where that is not quantized."""
  model, params = plain()
  inputs = QuantSpec(8, granularity="token")
  recipe = Recipe(
    (
      ("head", None),
      ("layers/0/.*", LayerRecipe(None, inputs)),
      (".*", LayerRecipe(QuantSpec(8), inputs)),
    )
  )
  q = ptq.quantize(model, params, recipe, "hadamard")
  exact = logits(model, params)
  assert float(jnp.linalg.norm(logits(q.model, q.params) - exact) / jnp.linalg.norm(exact)) < 0.02


@pytest.mark.slow
def test_matrices_and_products_in_bfloat16():
  model, params = plain(dtype="bfloat16")
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  exact = logits(model, params)
  for method in ("awq+gptq", "smoothquant"):
    q = ptq.quantize(model, halves, RECIPES["rtn_w8a8"], method, BATCHES[:1])
    assert float(jnp.linalg.norm(logits(q.model, q.params) - exact) / jnp.linalg.norm(exact)) < 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head(tied):
  model, params = plain(tied=tied)
  recipe = Recipe(((".*", W4A4.default),))
  q = ptq.quantize(model, params, recipe, "gptq" if not tied else "rtn", BATCHES)
  assert isinstance(q.params.get("head", {}).get("kernel"), qmatrix.QuantizedMatrix) != tied
  exact = logits(model, params)
  assert 1e-3 < jnp.linalg.norm(logits(q.model, q.params) - exact) / jnp.linalg.norm(exact) < 0.5


def test_documents_that_are_kept_apart_are_calibrated_apart():
  model, params = plain()
  masks = {
    "segment_ids": np.repeat([[1, 2]], 12, 1).reshape(1, 24).repeat(2, 0).astype(np.int32),
    "positions": np.tile(np.arange(12), 2)[None].repeat(2, 0).astype(np.int32),
  }
  apart = ptq.quantize(model, params, W4A16, "awq", [{**batch, **masks} for batch in BATCHES])
  halves = [
    {"tokens": np.concatenate([batch["tokens"][:, :12], batch["tokens"][:, 12:]])}
    for batch in BATCHES
  ]
  alone = ptq.quantize(model, params, W4A16, "awq", halves)
  for a, b in zip(jax.tree.leaves(apart.params), jax.tree.leaves(alone.params), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-4)


@pytest.mark.slow
def test_a_sharded_model_gets_the_same_codes():
  model, params = plain(kv_heads=2)
  expected = ptq.quantize(model, params, W4A16, "gptq", BATCHES[:1])
  mesh = mesh_lib.make_mesh(config.Mesh(2, 2, 2))
  placed = jax.device_put(params, mesh_lib.shardings(transformer.boxed_shapes(model), mesh))
  with mesh_lib.use(mesh):
    q = ptq.quantize(model, placed, W4A16, "gptq", BATCHES[:1])
    scores = logits(q.model, q.params)
  pairs = zip(jax.tree.leaves(q.params), jax.tree.leaves(expected.params), strict=True)
  differ = [np.mean(np.asarray(a) != np.asarray(b)) for a, b in pairs if a.dtype == jnp.int8]
  assert max(differ) < 0.01  # sums in another order round a few numbers otherwise
  np.testing.assert_allclose(scores, logits(expected.model, expected.params), atol=0.05)


def test_sizes_count_every_bit():
  model, params = plain()
  whole = sum(x.size for x in jax.tree.leaves(params)) * 4
  kernels = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
  outputs = sum(x.shape[0] * x.shape[2] for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
  assert (
    ptq.quantize(model, params, W4A16).size_bytes
    == whole - 4 * kernels + kernels // 2 + 4 * outputs
  )


def test_what_is_refused():
  model, params = plain()
  for call, message in {
    lambda: ptq.quantize(model, params, W4A4, "awq"): "awq looks at the inputs",
    lambda: ptq.quantize(model, params, W4A4, "awq", [{"tokens": TOKENS + 64}]): "tokens below 64",
    lambda: ptq.quantize(
      model, ptq.quantize(model, params, W4A4).params, W4A4
    ): "are quantized already",
  }.items():
    with pytest.raises(ConfigError, match=message):
      call()


@pytest.mark.parametrize(
  "recipe,method,message",
  [
    ("rtn_w4a4", "gptw", "did you mean 'gptq'"),
    ("lsq_w4a4", "gptq", "no learned scales"),
    ("lsq_w4a4", "hadamard", "neither rotates nor smooths"),
    ("lsq_w4a4", "smoothquant", "neither rotates nor smooths"),
    ("rtn_w4a16_g128", "quarot+gptq", "blocks of 128 do not divide a width of 64"),
    ("mxfp4", "rtn_mse", "has its own rule for scales"),
  ],
)
def test_what_does_not_go_together_is_refused_before_there_are_numbers(recipe, method, message):
  model, params = plain()
  for call in (
    lambda: ptq.check_quantizable(model, transformer.shapes(model), RECIPES[recipe], method),
    lambda: ptq.quantize(model, params, RECIPES[recipe], method, BATCHES),
  ):
    with pytest.raises(ConfigError, match=message):
      call()


@pytest.mark.parametrize("trained", ["quest_w4a4", "int8_gradients", "lsq_w4a4"])
def test_a_model_trained_quantized_takes_its_own_recipe_alone(trained):
  """Another recipe would quantize the underlying float weights, whose loss nobody measured."""
  model = transformer.Transformer(MODEL, dot_general_for(RECIPES[trained]))
  params = transformer.init(model, 0)
  assert ptq.quantized(model, params, RECIPES[trained]).method == "rtn"
  for recipe, method in (("int4_w4a16", "rtn"), ("none", "rtn"), (trained, "gptq")):
    for call in (
      lambda: ptq.check_quantizable(model, params, RECIPES[recipe], method),  # noqa: B023
      lambda: ptq.quantize(model, params, RECIPES[recipe], method, BATCHES),  # noqa: B023
    ):
      with pytest.raises(ConfigError, match=r"under another quantization.*dot_general_for=None"):
        call()
  ptq.quantize(model.clone(dot_general_for=None), params, RECIPES["int4_w4a16"])


def test_parameters_of_another_model_and_names_of_recipes_are_refused():
  (model, params), (deeper, _) = plain(), plain(blocks=4)
  for call, message in {
    lambda: ptq.quantize(deeper, params, W4A16): r"params: .* = '\(3, .*makes it \(4, ",
    lambda: ptq.quantize(plain(mlp="swiglu")[0], params, W4A16): r"gate/kernel = 'absent'",
    lambda: ptq.quantize(model, plain(mlp="swiglu")[1], W4A16): r"makes it absent",
    lambda: ptq.quantize(model, None, W4A16): "params = 'NoneType'",
    lambda: ptq.quantize(model, params, "rtn_w4a4"): r"recipe = 'rtn_w4a4'.*quant\.RECIPES",
    lambda: dot_general_for("rtn_w4a4"): r"recipe = 'rtn_w4a4'.*quant\.RECIPES",
  }.items():
    with pytest.raises(ConfigError, match=message):
      call()


@pytest.mark.parametrize("name", ["rtn_w4a16", "int4_w4a16"])
def test_a_methods_scale_replaces_that_of_every_grid_of_integers(name):
  for method in ("rtn_mse", "gptq_mse", "hadamard_mse", "hadamard+gptq_mse"):
    layer = ptq.METHODS[method].layer(RECIPES[name].default)
    assert (layer.weights.scale, layer.weights.grid) == ("mse", RECIPES[name].weights.grid)


def test_what_goes_together_is_not_refused():
  model = transformer.Transformer(MODEL)
  for method in ptq.METHODS:
    ptq.check_quantizable(model, transformer.shapes(model), W4A4, method)
