"""Matrices for which float32 is too narrow: the method's fallback is no worse than rounding to
nearest, reported and recorded; and numbers that codes would hide are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import STUDY

from beyond_outliers import quant
from beyond_outliers.errors import ConfigError
from beyond_outliers.model import transformer
from beyond_outliers.quant import RECIPES, ptq, qmatrix
from beyond_outliers.quant.ptq import calibration, conversion, gptq
from beyond_outliers.quant.ptq.calibration import Inputs
from beyond_outliers.quant.ptq.fallback import Fallback
from beyond_outliers.quant.spec import LayerRecipe, QuantSpec

W4A16 = RECIPES["rtn_w4a16"]
MODEL = dataclasses.replace(
  STUDY,
  heads=2,
  kv_heads=1,
  d_head=32,
  d_model=64,
  mlp_hidden=128,
  norm_placement="pre",
  qk_norm="none",
  attention_scale="rsqrt",
  tied=False,
  attention="plain",
)


@functools.cache
def model_and_params():
  model = transformer.Transformer(MODEL)
  return model, transformer.init(model, 0)


def layer_of(tokens=16, width=128):
  """(parameters of a linear layer, statistics of so few inputs that their Gram matrix is
  singular)."""
  draw = np.random.default_rng(0)
  x = draw.standard_normal((tokens, width)).astype(np.float32)
  w = jnp.asarray(draw.standard_normal((width, 24)), jnp.float32)
  size = np.abs(x)
  return {"kernel": w}, Inputs(*map(jnp.asarray, (size.max(0), size.mean(0), x.T @ x / tokens)))


def quantized(method, linear, inputs, recipe=W4A16):
  """(matrix, fallback, its layer's recipe)."""
  how = ptq.method_named(method)
  layer = how.layer(recipe.default)
  return (*conversion._quantized_matrix("layers/3/mlp/up", linear, layer, how, inputs), layer)


def output_error(weight, layer, linear, inputs):
  error = np.asarray(qmatrix.reconstruct(weight, layer) - linear["kernel"], np.float64)
  return np.sum(error * (np.asarray(inputs.gram_KxK, np.float64) @ error))


@pytest.mark.parametrize(
  "method",
  [
    name if name == "gptq" else pytest.param(name, marks=pytest.mark.slow)
    for name, how in ptq.METHODS.items()
    if "damping" in how.options
  ],
)
def test_a_gram_matrix_without_a_factor_is_damped_more(method):
  linear, inputs = layer_of()
  name = method + "(damping=1e-10)"
  weight, fallback, layer = quantized(name, linear, inputs)
  assert fallback.matrix == "layers/3/mlp/up" and fallback.rounding == ptq.METHODS[method].rounding
  assert 1e-8 < fallback.damping < 1e-4
  nearest, none, _ = quantized("rtn", linear, inputs)
  ours = output_error(weight, layer, linear, inputs)
  assert none is None and ours < output_error(nearest, W4A16.default, linear, inputs)
  same, none, _ = quantized(f"{method}(damping={fallback.damping})", linear, inputs)
  assert none is None and np.mean(weight.codes != same.codes) < 0.01


def test_what_is_worse_than_rounding_is_not_taken(monkeypatch):
  """Codes that are all zero, whatever the damping."""
  spoiled = dataclasses.replace(ptq.METHODS["gptq"], rounding="spoiled", damping=1e-3)

  def spoil(w_KxO, scale, spec, gram_KxK, damping):
    return quant.Quantized(0 * w_KxO, jnp.where(damping == 1e-3, jnp.nan, scale))

  monkeypatch.setitem(gptq.ROUNDERS, "spoiled", gptq.Rounder(spoil, True, ("damping",)))
  linear, inputs = layer_of()
  weight, fallback = conversion._quantized_matrix("head", linear, W4A16.default, spoiled, inputs)
  assert fallback == Fallback("head", "nearest", None)
  nearest, _, _ = quantized("rtn", linear, inputs)
  jax.tree.map(np.testing.assert_array_equal, weight, nearest)


def test_gptq_alone_shows_in_the_scales_that_there_is_no_factor():
  linear, inputs = layer_of()
  w, spec = linear["kernel"], QuantSpec(4)
  scale = quant.quantizers.scale_of(w, spec, 0)
  assert np.isnan(gptq.gptq(w, scale, spec, inputs.gram_KxK, 1e-10).scale).all()


@pytest.mark.parametrize("method", ["gptq", "gptq_in_order"])
@pytest.mark.parametrize("width", [64, 300])
def test_errors_that_overflow_as_they_are_compensated_are_not_hidden_in_codes(method, width):
  """Of large weights behind large inputs: an error over a diagonal entry of U is out of range."""
  linear, inputs = layer_of(256, width)
  linear = {"kernel": linear["kernel"] * 1e25}
  inputs = inputs._replace(gram_KxK=inputs.gram_KxK * 1e34)
  weight, fallback, _ = quantized(method, linear, inputs)
  assert fallback == Fallback("layers/3/mlp/up", "nearest")
  nearest, _, _ = quantized("rtn", linear, inputs)
  jax.tree.map(np.testing.assert_array_equal, weight, nearest)


@pytest.mark.parametrize(
  "method, change",
  [
    ("smoothquant(alpha=1)", dict(largest_K=3e38)),  # factors below float32's normal numbers
    ("smoothquant(alpha=1)", dict(largest_K=np.inf)),
    ("awq", dict(gram_KxK=1e38)),  # no output's change is finite
  ],
)
def test_factors_out_of_range_leave_a_matrix_unsmoothed(method, change):
  linear, inputs = layer_of()
  inputs = inputs._replace(**{k: jnp.full_like(getattr(inputs, k), v) for k, v in change.items()})
  weight, fallback, _ = quantized(method, linear, inputs)
  assert fallback == Fallback("layers/3/mlp/up", "nearest") and weight.smooth is None
  nearest, _, _ = quantized("rtn", linear, inputs)
  jax.tree.map(np.testing.assert_array_equal, weight, nearest)


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_a_channel_without_inputs_or_weights_keeps_a_factor(method):
  linear, inputs = layer_of()
  dead = Inputs(
    inputs.largest_K.at[0].set(0), inputs.mean_K.at[0].set(0), inputs.gram_KxK.at[0].set(0)
  )
  linear = {"kernel": linear["kernel"].at[1].set(0)}
  weight, fallback, _ = quantized(method, linear, dead)
  assert fallback is None and np.isfinite(weight.smooth).all() and (weight.smooth > 0).all()


@pytest.mark.parametrize(
  "spec",
  [
    QuantSpec(4, "midrise", "gaussian"),
    QuantSpec(2),
    QuantSpec(8, "twos_complement", "absmax_edge"),
  ],
)
def test_numbers_whose_scale_overflows_are_refused_by_name(spec):
  linear, inputs = layer_of()
  linear = {"kernel": jnp.full_like(linear["kernel"], 3.4e38)}
  with pytest.raises(ConfigError, match=r"^params: layers/3/mlp/up = 3\.39.*its scale overflows"):
    conversion._quantized_matrix(
      "layers/3/mlp/up", linear, LayerRecipe(spec), ptq.METHODS["rtn"], inputs
    )


def test_it_is_said_recorded_and_kept(tmp_path):
  model, params = model_and_params()
  batch, said = [{"tokens": np.arange(20)[None] % 64}], []
  recipe = quant.Recipe(((".*/mlp/down", W4A16.default), (".*", None)))
  q = ptq.quantize(model, params, recipe, "gptq(damping=1e-10)", batch, say=said.append)
  assert [each.matrix for each in q.fallbacks] == ["layers/0/mlp/down", "layers/1/mlp/down"]
  assert {each.rounding for each in q.fallbacks} == {"gptq"}
  text = "gptq(damping=1e-10) is out of float32's reach for layers/1/mlp/down: gptq with damping "
  assert sum(line.startswith(text) for line in said) == 1
  assert (np.asarray(q.params["layers"]["mlp"]["down"]["kernel"].codes) == 0).mean() < 0.3
  q.save(tmp_path / "q")
  assert quant.load(tmp_path / "q").fallbacks == q.fallbacks
  healthy = ptq.quantize(model, params, recipe)
  assert healthy.fallbacks == () and "fallbacks" not in quant.storage.pack_model(healthy)[1]


@pytest.mark.parametrize("method", ptq.METHODS)
@pytest.mark.parametrize(
  "leaf, path", [("layers/mlp/up/kernel", "layers/1/mlp/up/kernel"), ("embedding", "embedding")]
)
def test_parameters_that_are_not_finite_are_refused_before_any_work(
  method, leaf, path, monkeypatch
):
  monkeypatch.setattr(calibration, "Stream", None)
  model, params = model_and_params()
  leaves = quant.storage.leaves_by_path(params)
  for number in (np.nan, np.inf):
    bad = {**leaves, leaf: leaves[leaf].at[-1, -1].set(number)}
    with pytest.raises(ConfigError, match=rf"^params: {path} = 'not finite': NaN or infinity"):
      ptq.quantize(
        model, quant.storage.tree_of(bad), W4A16, method, [{"tokens": np.arange(20)[None]}]
      )


SWAPPED = np.dtype(np.float32).newbyteorder("S")


@pytest.mark.parametrize("dtype", [SWAPPED, jnp.float8_e4m3fn, np.int8, np.complex64, object])
def test_parameters_of_other_types_are_refused(dtype):
  """Compiled code reads swapped bytes as they lie, and a complex number loses a part."""
  model, params = model_and_params()
  bad = {**params, "embedding": np.asarray(params["embedding"]).astype(dtype)}
  for _ in range(2):
    with pytest.raises(ConfigError, match=r"^params: embedding = '.*': expected an array of float"):
      ptq.quantize(model, bad, W4A16)
    ptq.quantize(model, params, W4A16)
  with pytest.raises(ConfigError, match=r"^params: embedding = 'list': expected an array"):
    ptq.quantize(model, {**params, "embedding": params["embedding"].tolist()}, W4A16)


def test_arrays_of_numpy_are_kept_as_the_model_computes_with_them(tmp_path):
  """float64 without jax_enable_x64 is float32, also where nothing is quantized."""
  model, params = model_and_params()
  q = ptq.quantize(
    model, jax.tree.map(lambda x: np.asarray(x, np.float64).copy("F"), params), W4A16
  )
  assert q.params["embedding"].dtype == jnp.float32
  q.save(tmp_path / "q")
  jax.tree.map(np.testing.assert_array_equal, quant.load(tmp_path / "q").params, q.params)


@pytest.mark.parametrize(
  "tokens, message",
  [
    (np.zeros((0, 8), int), "gptq looks at the inputs"),
    (np.array([[1, -1]]), "calibration_batches = -1: the model knows tokens below 64"),
    (np.array([[1, 64]]), "calibration_batches = 64: the model knows tokens below 64"),
  ],
)
def test_tokens_that_calibrate_nothing_are_refused(tokens, message):
  with pytest.raises(ConfigError, match=message):
    ptq.quantize(*model_and_params(), W4A16, "gptq", [{"tokens": tokens}])


def test_inputs_of_the_head_that_overflow_are_refused():
  model, params = model_and_params()
  params = {**params, "final_norm": {"gain": params["final_norm"]["gain"] * 3e38}}
  recipe = quant.Recipe((("head", W4A16.default), (".*", None)))
  with pytest.raises(ConfigError, match=r"^calibration_batches: head = 'not finite'"):
    ptq.quantize(model, params, recipe, "gptq", [{"tokens": np.arange(20)[None]}])
