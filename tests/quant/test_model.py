"""Recipes in the model: one parameter tree, the same numbers however it is run, rules over depths,
and a run that trains."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import STUDY

from beyond_outliers import config, train
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.model import linears, loss, stack, transformer
from beyond_outliers.quant import (
  RECIPES,
  LayerRecipe,
  QuantSpec,
  Recipe,
  dot_general_for,
  fake_quantize,
)
from beyond_outliers.train import program as program_lib
from configs import adamw, shampoo_qat

# Heads are as wide as a rotation's block. In a block of two heads that share a key-value head, the
# heads' outputs for the first token, which attends only to itself, would be equal: half of the
# block would rotate to zero, with a sign that depends on float rounding.
MODEL = dataclasses.replace(STUDY, d_head=128, d_model=128, mlp_hidden=256, attention="plain")
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab, (4, 13)).astype(np.int32)
# Of integers, and of floating point, in the fast tests.
FAMILIES = ("quest_w4a4", "fp8")
NAMES = [name for name in RECIPES if name != "none"]
# One of those that differ in their bits alone, whose programs are the same.
KINDS = {re.sub("bits=[^,]+", "", repr(RECIPES[n].default)): n for n in [*NAMES, *FAMILIES]}
EVERY_KIND = [
  name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow)
  for name in KINDS.values()
]


def quantized(recipe, c=MODEL, backend="aqt"):
  return transformer.Transformer(c, dot_general_for(RECIPES.get(recipe, recipe), backend))


def fresh(model):
  """Numbers that all differ, and that cost no compilation."""
  draw = np.random.default_rng(1)

  def number(path, leaf):
    mean = 0 if leaf.ndim == 3 else -2 if path[-1].key == "log_scale" else 0.5
    return jnp.asarray(draw.normal(mean, 0.1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(number, transformer.shapes(model))


def logits(model, params, tokens=TOKENS, **rngs):
  return jax.jit(lambda params: model.apply({"params": params}, tokens, rngs=rngs))(params)


def loss_and_grads(model, params, key=None, tokens=TOKENS):
  def loss_fn(params):
    scores = model.apply(
      {"params": params}, tokens[:, :-1], rngs=None if key is None else {"rounding": key}
    )
    return loss.cross_entropy(
      scores.reshape(-1, scores.shape[-1]), tokens[:, 1:].reshape(-1)
    ).mean()

  return jax.jit(jax.value_and_grad(loss_fn))(params)


def assert_trees_near(actual, expected, tolerance=1e-5):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
    )


def paths(tree):
  return {
    jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_of_full_precision(name):
  plain = paths(transformer.shapes(transformer.Transformer(MODEL)))
  ours = paths(transformer.shapes(quantized(name)))
  scales = {
    path: leaf for path, leaf in ours.items() if path.endswith("/log_scale") and path not in plain
  }
  assert {path: leaf for path, leaf in ours.items() if path not in scales} == plain
  learned = len(linears.linear_paths(MODEL)) if name.startswith("lsq") else 0
  assert [leaf.shape for leaf in scales.values()] == [(2, 2)] * learned


@pytest.mark.parametrize("name", EVERY_KIND)
def test_scanned_unrolled_rematerialised_and_sharded_are_one(name):
  """In float64: in float32, another order of summation changes a few of a model's million codes,
  each felt everywhere. Unrolled on one device; scanned, rematerialised and sharded."""
  unrolled, model = (
    quantized(name, dataclasses.replace(MODEL, dtype="float64", **change), "jax")
    for change in ({"unroll": 0}, {"remat": "full"})
  )
  mesh = mesh_lib.make_mesh(config.Mesh(2, 2, 2))
  params, shardings = fresh(model), mesh_lib.shardings(transformer.boxed_shapes(model), mesh)
  with jax.enable_x64(True):
    expected = loss_and_grads(unrolled, params)
    assert np.isfinite(expected[0]) and all(
      np.any(leaf != 0) for leaf in jax.tree.leaves(expected[1])
    )
    with mesh_lib.use(mesh):
      assert_trees_near(loss_and_grads(model, jax.device_put(params, shardings)), expected)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_the_past_does_not_see_the_future_nor_a_window_the_others(name):
  model, changed = quantized(name), np.array(TOKENS)
  changed[0, 7:], changed[1:] = changed[0, :6], 0
  params = fresh(model)
  apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
  before, after = apply(params, TOKENS), apply(params, changed)
  np.testing.assert_array_equal(before[0, :7], after[0, :7])
  assert np.all(np.any(before[0, 7:] != after[0, 7:], -1))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_rules_that_treat_depths_differently_run_over_the_same_parameters():
  """The first block's weights rounded to four bits: by a rule, and beforehand."""
  w4 = LayerRecipe(QuantSpec(4))
  plain, ruled = (
    transformer.Transformer(MODEL),
    quantized(Recipe((("layers/0/.*", w4), (".*", None)))),
  )
  params = fresh(plain)
  assert paths(transformer.shapes(ruled)) == paths(transformer.shapes(plain))

  def rounded(path, leaf):
    return (
      leaf.at[0].set(fake_quantize(leaf[0], w4.weights, axis=0))
      if path[-1].key == "kernel"
      else leaf
    )

  expected = logits(plain, jax.tree_util.tree_map_with_path(rounded, params))
  np.testing.assert_allclose(logits(ruled, params), expected, atol=1e-5)
  assert np.abs(expected - logits(plain, params)).max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", ["aqt", "jax"])
def test_the_head_is_a_rule_like_any_other(tied, backend):
  """Weights and inputs rounded to four bits a row, also where the weights are the embedding."""
  c = dataclasses.replace(MODEL, tied=tied, blocks=1)
  w4a4 = LayerRecipe(QuantSpec(4), QuantSpec(4, granularity="token"))
  plain, ruled = (
    transformer.Transformer(c),
    quantized(Recipe((("head", w4a4), (".*", None))), c, backend),
  )
  params = fresh(plain)
  hidden = jax.jit(lambda params: plain.apply({"params": params}, TOKENS, method="hidden"))(params)
  weights = params["embedding"].T if tied else params["head"]["kernel"]
  expected = fake_quantize(hidden, w4a4.activations) @ fake_quantize(weights, w4a4.weights, axis=0)
  np.testing.assert_allclose(logits(ruled, params), expected, atol=1e-4)
  assert np.abs(expected - logits(plain, params)).max() > 1e-2


@pytest.mark.slow
def test_both_backends_are_one_in_the_model():
  remat = dataclasses.replace(MODEL, remat="full")
  params = fresh(quantized("quest_w4a4"))
  ours, aqts = (
    loss_and_grads(quantized("quest_w4a4", c, backend), params)
    for c, backend in ((MODEL, "jax"), (remat, "aqt"))
  )
  assert_trees_near(ours, aqts)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aqt", "jax"])
def test_stochastic_gradients_are_drawn_by_the_key(backend):
  model = quantized("int8_gradients", backend=backend)
  params, keys = fresh(model), jax.random.split(jax.random.key(0))
  grads = [
    loss_and_grads(model, params, key)[1]["layers"]["mlp"]["up"]["kernel"]
    for key in (keys[0], keys[0], keys[1])
  ]
  np.testing.assert_array_equal(grads[0], grads[1])
  assert (np.asarray(grads[0]) != grads[2]).any(axis=(1, 2)).all()


def test_layers_draw_different_numbers():
  """Blocks that compute the same of the same: what differs was drawn."""

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      dot_general = dot_general_for(
        Recipe(((".*", LayerRecipe(QuantSpec(4, rounding="stochastic"))),)), "jax"
      )("up")
      return x, dot_general()(x, x.T, (((1,), (0,)), ((), ())))

  scan = nn.scan(
    Twice,
    variable_axes={"params": 0},
    length=2,
    split_rngs=dict.fromkeys(("params", *stack.STREAMS), True),
  )
  x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
  drawn = scan().apply({}, x, rngs={"rounding": jax.random.key(0)})[1]
  assert np.any(drawn[0] != drawn[1])
  nearest = scan().apply({}, x)[1]
  np.testing.assert_array_equal(nearest[0], nearest[1])


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
  """(workdir in full precision, workdir of four bits that began with its parameters), ten steps
  each."""
  root = tmp_path_factory.mktemp("runs")
  for name, more in (
    ("plain", {}),
    ("quest", {"quant.recipe": "quest_w4a4", "warm_start": root / "plain"}),
  ):
    c = config.resolve(adamw.get_config(tiny(**more)))
    assert train.run(c, root / name, say=lambda text: None, devices=jax.devices()[:1]) == "done"
  return root / "plain", root / "quest"


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [row["train/loss"] for row in rows if "train/loss" in row], [
    row["eval/loss"] for row in rows if "eval/loss" in row
  ]


def test_a_run_goes_on_in_four_bits_from_full_precision(trained):
  (plain, plain_eval), (quest, quest_eval) = map(losses, trained)
  assert plain[-1] < plain[0] - 1
  # It begins where the other ended, and learns on.
  assert plain[0] - 1 > quest[0] and quest[-1] < quest[0]
  assert quest_eval[-1] < plain_eval[-1]


def test_evaluation_is_of_the_quantized_model(trained, tiny):
  """The loss of the same parameters, with and without the recipe."""
  c = config.resolve(adamw.get_config(tiny(**{"quant.recipe": "quest_w4a4"})))
  program = program_lib.build_program(c, jax.devices()[:1])
  params = fresh(program.model)
  batch = {
    name: jnp.ones((8, 32), jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")
  }
  batch["weights"] = jnp.ones((8, 32))
  with mesh_lib.use(program.mesh):
    nll = program.eval_step(params, batch)[0]
  ours, plain = (
    loss.cross_entropy(
      logits(model, params, batch["tokens"]).reshape(-1, 264), batch["targets"].reshape(-1)
    )
    for model in (program.model, transformer.Transformer(c.model))
  )
  np.testing.assert_allclose(nll.reshape(-1), ours, rtol=1e-5)
  assert np.abs(ours - plain).max() > 1e-3


@pytest.mark.parametrize(
  "overrides,message",
  [
    (
      "quant.recipe=quest_w4a5",
      "quant.recipe = 'quest_w4a5': unknown recipe; did you mean 'quest_w4a4'",
    ),
    ("quant.rules.head.recipe=rtn", "quant.rules.head.recipe = 'rtn': unknown recipe"),
    ("quant.rules.first.paths=.*", "quant.rules.first.recipe = '': unknown recipe"),
    ("quant.rules.first.recipe=none", "quant.rules = '': no linear layer is left for this rule"),
    (
      "quant.rules.head.paths=heads",
      "quant.rules = 'heads': no linear layer is left for this rule",
    ),
    ("quant.backend=torch", "quant.backend = 'torch': expected one of 'aqt', 'jax'"),
    (
      "quant.recipe=mxfp4,model.d_head=10",
      "layers/0/attention/q: granularity = 'mx': blocks of 32 do not divide a width of 30",
    ),
    ("quant.receipe=none", "quant.receipe: unknown key; did you mean 'recipe'"),
  ],
)
def test_what_a_run_refuses(overrides, message):
  with pytest.raises(config.ConfigError, match=message):
    program_lib.build_program(
      config.resolve(shampoo_qat.get_config("nano," + overrides)), jax.devices()[:1]
    )


def test_a_mesh_that_would_cut_blocks_is_refused(tiny):
  c = config.resolve(adamw.get_config(tiny(**{"quant.recipe": "quest_w4a4", "mesh.model": 2})))
  with pytest.raises(
    config.ConfigError,
    match=r"mesh.model = 2: layers/0/attention/o sums over 48 numbers, 24 on each",
  ):
    program_lib.build_program(c)


def test_trees_hold_boxes_of_learned_scales():
  boxes = transformer.boxed_shapes(quantized("lsq_w4a4"))
  scale = boxes["layers"]["mlp"]["up"]["QuantizedDot_0"]["log_scale"]
  assert isinstance(scale, nn.Partitioned) and scale.names == ("layers", "vector")
