"""A quantized linear layer is one function: trained, evaluated, and served from its codes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import STUDY

from beyond_outliers import quant
from beyond_outliers.model import transformer
from beyond_outliers.quant import RECIPES, dot_general_for, qmatrix, quantizers
from beyond_outliers.quant.backends import aqt as aqt_backend
from beyond_outliers.quant.dot import BACKENDS, QuantizedDot

FAMILIES = ("rtn_w4a16", "quest_w4a4", "lsq_w4a4", "fp8", "nvfp4")
EVERY = [
  name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow)
  for name in RECIPES
  if name != "none"
]
# Unless programs are optimized, two of them differ in the last bit of a scale of these.
IN_THE_LAST_BIT = ("quest_w1a1", "quest_w1.58a1.58")
NUMBERS = (((1,), (0,)), ((), ()))
MODEL = dataclasses.replace(STUDY, d_head=32, d_model=128, mlp_hidden=256, attention="plain")


def outputs(layer, dtype):
  """{how: the layer's output on the same input}, and the served matrix's codes."""
  draw = np.random.default_rng(0)
  x = jnp.asarray(draw.standard_t(4, (48, 256)), dtype)
  w = jnp.asarray(draw.standard_normal((256, 96)) * 0.02, jnp.float32)
  every = {}
  for backend in BACKENDS:
    dot = QuantizedDot(layer, backend)
    if backend == "aqt" and not aqt_backend.expresses(layer):
      continue
    variables = nn.unbox(dot.init(jax.random.key(0), x, w, NUMBERS))
    evaluated = functools.partial(dot.apply, variables, dimension_numbers=NUMBERS)

    def trained(x, w, evaluated=evaluated):
      y, pullback = jax.vjp(evaluated, x, w)
      return y, pullback(jnp.ones_like(y))

    def codes(w, variables=variables):
      prepared, spec = qmatrix.in_quantized_basis(w, layer), layer.weights
      learned = spec.scale == "learned"
      scale = (
        jnp.exp(variables["params"]["log_scale"][-1]).reshape(1, 1)
        if learned
        else quantizers.scale_of(prepared, spec, 0)
      )
      return qmatrix.QuantizedMatrix(*quantizers.forward(prepared, scale, spec)[0])

    served = jax.jit(codes)(w)
    every[f"{backend}, trained"] = jax.jit(trained)(x, w)[0]
    every[f"{backend}, evaluated"] = jax.jit(evaluated)(x, w)
    every[f"{backend}, served"] = jax.jit(evaluated)(x, served)
  return every, served


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_a_layer_is_the_same_however_it_runs(request, name, dtype):
  """To the bit where codes are multiplied as integers, and to float rounding elsewhere."""
  if name in IN_THE_LAST_BIT:
    request.getfixturevalue("optimized")
  layer = RECIPES[name].default
  every, served = outputs(layer, dtype)
  expected = every.pop("jax, served")
  integer = (
    layer.activations is not None
    and served.codes.dtype == layer.activations.levels.dtype == jnp.int8
  )
  largest = np.abs(expected).max()
  assert largest > 0.1 and len(every) in (2, 5)
  for how, y in every.items():
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(
      y, expected, rtol=0, atol=0 if integer else 1e-6 * largest, err_msg=how
    )


@pytest.mark.parametrize("name", ["quest_w4a4", "lsq_w4a4"])
def test_a_model_trained_in_four_bits_is_served_from_its_codes(name, tmp_path):
  """All logits of the trained model, the learned scales among its parameters, and those of what was
  saved. The two are other programs, whose norms may differ in the last bit: where that moves an
  activation beyond the middle of two codes, depending on the CPU, the logits of its position do."""
  model = transformer.Transformer(MODEL, dot_general_for(RECIPES[name]))
  draw, tokens = np.random.default_rng(0), np.arange(36).reshape(3, 12)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0.5 if leaf.ndim < 3 else 0, 0.1, leaf.shape), leaf.dtype),
    transformer.shapes(model),
  )
  quant.quantized(model, params, RECIPES[name]).save(tmp_path / "a")
  q = quant.load(tmp_path / "a")
  trained, served = (
    jax.jit(lambda params, model=model: model.apply({"params": params}, tokens))(params)
    for model, params in ((model, params), (q.model, q.params))
  )
  largest = np.abs(trained).max()
  equal_BxL = np.isclose(served, trained, rtol=0, atol=1e-5 * largest).all(-1)
  assert equal_BxL.mean() > 0.9
  np.testing.assert_allclose(served, trained, rtol=0, atol=0.03 * largest)
  np.testing.assert_array_equal(np.argmax(served, -1)[equal_BxL], np.argmax(trained, -1)[equal_BxL])
