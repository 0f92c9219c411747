"""Recipes: the named ones mean what is published, and rules that don't fit a model are refused
before any work."""

import re

import jax
import numpy as np
import pytest

from beyond_outliers import config
from beyond_outliers.errors import ConfigError
from beyond_outliers.model import linears
from beyond_outliers.quant import (
  RECIPES,
  LayerRecipe,
  LinearShape,
  QuantSpec,
  Recipe,
  quantizers,
  recipes,
)
from configs import adamw

W4 = LayerRecipe(QuantSpec(4))


def contractions(**overrides):
  c = config.resolve(config.override(adamw.get_config("nano").unlock(), overrides))
  return {path: LinearShape(width) for path, (width, _) in linears.contractions(c.model).items()}


# Groups of 128 do not divide nano's widths.
@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_g128")])
def test_named_recipes_leave_the_head_and_fit_the_model(name):
  recipe = RECIPES[name]
  recipe.check(contractions())
  assert recipe.layer("head") is None
  assert recipe.layer("layers/1/mlp/up") is recipe.default


# Weights' and activations' bits of the names that users hold on to.
BITS = {
  "none": (None, None),
  "rtn_w8a8": (8, 8),
  "rtn_w4a4": (4, 4),
  "rtn_w4a16": (4, None),
  "rtn_w3a16": (3, None),
  "rtn_w2a16": (2, None),
  "rtn_w4a16_g128": (4, None),
  "int8_w8a8": (8, 8),
  "int4_w4a4": (4, 4),
  "int4_w4a16": (4, None),
  "int3_w3a16": (3, None),
  "int2_w2a16": (2, None),
  "int4_w4a16_g128": (4, None),
  "quest_w1a1": (1, 1),
  "quest_w2a2": (2, 2),
  "quest_w3a3": (3, 3),
  "quest_w4a4": (4, 4),
  "quest_w8a8": (8, 8),
  "quest_w1.58a1.58": (1.585, 1.585),
  "quest_w4a16": (4, None),
  "lsq_w4a4": (4, 4),
  "lsq_w4a4_unsigned": (4, 4),
  "fp8": (8, 8),
  "mxfp4": (4, 4),
  "nvfp4": (4, 4),
  "int8_gradients": (8, 8),
}


def test_named_recipes_are_what_their_names_say():
  def bits(spec):
    return None if spec is None else spec.bits

  actual = {name: (bits(r.weights), bits(r.activations)) for name, r in RECIPES.items()}
  meant = {"16": None, "1.58": 1.585}  # activations of 16 bits are not quantized
  for name, found in actual.items():
    said = re.search(r"_w([\d.]+)a([\d.]+)", name)
    assert said is None or found == tuple(meant.get(b, float(b)) for b in said.groups()), name
  assert {name: actual.get(name) for name in BITS} == BITS


def served_integers(rows, bits, group):
  """(codes, scales) of symmetric integers as compressed-tensors 0.20, llm-compressor 0.14 and
  torchao 0.18 find them, in float32: calculate_qparams, whose scales are not zero, and quantize."""
  blocks = rows.reshape(len(rows), -1, group)
  largest = np.maximum(abs(np.minimum(blocks.min(-1), 0)), abs(np.maximum(blocks.max(-1), 0)))
  scale = largest / np.float32((2**bits - 1) / 2)
  scale = np.where(scale == 0, np.finfo(np.float32).eps, scale)
  lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  codes = np.rint(np.clip(blocks / scale[..., None], lowest, highest))
  return codes.reshape(rows.shape), scale


@pytest.mark.parametrize("name", [name for name in RECIPES if re.match(r"int\d_w", name)])
def test_integers_are_those_that_engines_serve(name):
  """Every code and scale: of long tails and normal numbers, of ties, of zeros, of one number that
  is huge; and a number that is not finite shows."""
  draw = np.random.default_rng(0)
  bits, width = int(name[3]), 256
  ties = np.resize(np.arange(2**bits) - np.float32((2**bits - 1) / 2), width)  # halves, scale one
  huge = draw.standard_normal(width)
  huge[9] = 3e37
  rows = np.float32(
    [
      *draw.standard_t(3, (60, width)),
      *draw.standard_normal((500, width)),
      *(ties, -ties, np.minimum(ties, 0), huge, -huge, np.zeros(width), 1e-30 * ties),
      np.repeat([0, 1], width // 2),  # zeros that are a group
    ]
  )
  assert (rows.min(1) < -rows.max(1)).mean() > 0.4  # whose largest number lies halfway
  jitted = jax.jit(quantizers.quantize_array, static_argnums=(1, 2))
  for spec in (RECIPES[name].weights, RECIPES[name].activations):
    if spec is None:
      continue
    codes, scale = served_integers(rows, bits, spec.group or width)
    assert (codes.min(), codes.max()) == (spec.levels.lowest, spec.levels.largest)
    for quantize in (quantizers.quantize_array, jitted):
      ours_codes, ours_scale = map(np.asarray, quantize(rows, spec, 1))
      np.testing.assert_array_equal(ours_codes, codes)
      zero = ours_scale == 0
      np.testing.assert_array_equal(ours_scale[~zero], scale[~zero])
      assert not rows.reshape(*zero.shape, -1)[zero].any()
    for number in (np.nan, np.inf, -np.inf):
      spoiled = rows.copy()
      spoiled[1, 3] = number
      assert np.isnan(jitted(spoiled, spec, 1).scale[1, 0])


def test_the_first_rule_that_matches_the_whole_path_decides():
  other = LayerRecipe(QuantSpec(8))
  recipe = Recipe((("layers/0/.*", None), (".*/attention/[qk]", other), ("head", None), (".*", W4)))
  recipe.check(contractions())
  assert recipe.layer("layers/0/attention/q") is None
  assert recipe.layer("layers/1/attention/q") is other
  assert recipe.layer("layers/1/attention/v") is W4


def test_rules_of_a_config_come_before_its_recipe():
  resolved = config.resolve(
    adamw.get_config(
      "nano,quant.recipe=quest_w4a4,quant.rules.head.recipe=rtn_w8a8,"
      "quant.rules.first.paths=layers/0/.*,quant.rules.first.recipe=none"
    )
  )
  assert config.resolve(config.to_dict(resolved)) == resolved
  recipe = recipes.from_config(resolved.quant)
  recipe.check(contractions())
  assert recipe.layer("head") == RECIPES["rtn_w8a8"].default
  assert recipe.layer("layers/0/mlp/up") is None
  assert recipe.layer("layers/1/mlp/up") == RECIPES["quest_w4a4"].default


@pytest.mark.parametrize(
  "name,hint",
  [
    ("quest_w4a5", "did you mean 'quest_w4a4'"),
    ("rtn_w9a9", "did you mean 'rtn_w8a8'"),
    ("xyz", "expected one of none, rtn_w8a8"),
  ],
)
def test_unknown_recipes_are_refused_with_the_nearest(name, hint):
  with pytest.raises(ConfigError, match=f"quant.recipe = '{name}': unknown recipe; {hint}"):
    recipes.recipe_named(name)


@pytest.mark.parametrize(
  "rules,sizes,message",
  [
    (
      (("layers/7/.*", None), (".*", W4)),
      {},
      "quant.rules = 'layers/7/.*': no linear layer is left.*attention/q",
    ),
    (
      (("layers/.*", None), ("layers/0/.*", W4), (".*", None)),
      {},
      "quant.rules = 'layers/0/.*': no linear layer is left",
    ),
    ((("layers/.*", W4),), {}, "none matches the linear layer 'head'"),
    (
      ((".*", LayerRecipe(QuantSpec(4, granularity="group", group=100))),),
      {},
      "quant: layers/0/attention/q: group = 100: blocks of 100 do not divide a width of 384",
    ),
    (
      RECIPES["mxfp4"].rules,
      {"model.heads": 3, "model.d_head": 10},
      "blocks of 32 do not divide a width of 30",
    ),
  ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rules, sizes, message):
  with pytest.raises(ConfigError, match=message):
    Recipe(rules).check(contractions(**sizes))


def test_blocks_that_a_shard_would_cut_are_refused():
  widths = {"layers/0/mlp/down": LinearShape(256, 4), "head": LinearShape(256)}
  with pytest.raises(
    ConfigError,
    match=r"mesh.model = 4: layers/0/mlp/down .* 64 on each .* blocks of 128 of the rotation",
  ):
    RECIPES["quest_w4a4"].check(widths)
  RECIPES["rtn_w4a4"].check(widths)
  RECIPES["mxfp4"].check(widths)


def test_a_rule_that_is_no_regular_expression_is_refused():
  with pytest.raises(ConfigError, match=r"quant.rules: 'layers/\(' is not a regular expression"):
    Recipe((("layers/(", None),))
