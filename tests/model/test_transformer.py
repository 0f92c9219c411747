"""Properties of the decoder that hold for any parameters; test_golden.py compares numbers."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from beyond_outliers import config
from beyond_outliers.model import attention, linears, loss, stack, transformer
from beyond_outliers.params import Axes, leaves_by_path
from configs import adamw

STUDY = dataclasses.replace(
  small_models.STUDY,
  vocab=40,
  blocks=3,
  heads=6,
  d_head=4,
  d_model=24,
  mlp_hidden=32,
  attention="plain",
)
OLMO2 = dataclasses.replace(
  STUDY, mlp="swiglu", qk_norm="rms", attention_scale="rsqrt", rope_layout="half", tied=False
)
LLAMA = dataclasses.replace(OLMO2, norm_placement="pre", qk_norm="none")
ARCHITECTURES = {"study": STUDY, "olmo2": OLMO2, "llama": LLAMA}
TOKENS = np.random.default_rng(0).integers(0, STUDY.vocab, (2, 12)).astype(np.int32)


def random_params(model):
  """Numbers that all differ, gains and scales included."""
  draw = np.random.default_rng(1)
  shapes = nn.unbox(transformer.boxed_shapes(model))
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0.5 if leaf.ndim < 3 else 0, 0.2, leaf.shape), leaf.dtype),
    shapes,
  )


def run(model, params, *args, **options):
  """model.apply, compiled: much faster than eager at these sizes."""
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args, **options))(
    params, *args
  )


def loss_and_grads(model, params):
  def loss_fn(params):
    logits = model.apply({"params": params}, TOKENS[:, :-1])
    return loss.cross_entropy(
      logits.reshape(-1, logits.shape[-1]), TOKENS[:, 1:].reshape(-1)
    ).mean()

  return jax.jit(jax.value_and_grad(loss_fn))(params)


def assert_trees_near(actual, expected, tolerance):
  """To `tolerance` of the largest number of each leaf."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
    )


def paths(tree, is_leaf=None):
  return {
    jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  }


@pytest.mark.parametrize(
  ("architecture", "implementation"),
  [
    *(("study", name) for name in attention.IMPLEMENTATIONS),
    ("olmo2", "plain"),
    ("llama", "plain"),
  ],
)
def test_packed_documents_equal_documents_alone(architecture, implementation):
  model = transformer.Transformer(
    dataclasses.replace(ARCHITECTURES[architecture], attention=implementation)
  )
  params = random_params(model)
  ends = [(0, 4), (4, 8), (8, 12)]
  segments = np.repeat([1, 2, 3], 4).astype(np.int32) * np.ones_like(TOKENS)
  positions = np.tile(np.arange(4), 3).astype(np.int32) * np.ones_like(TOKENS)

  packed = run(model, params, TOKENS, segments, positions)
  alone = run(model, params, np.concatenate([TOKENS[:, a:b] for a, b in ends]))
  for i, (a, b) in enumerate(ends):
    np.testing.assert_allclose(packed[:, a:b], alone[2 * i : 2 * i + 2], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_sees_no_later_one(architecture):
  model = transformer.Transformer(ARCHITECTURES[architecture])
  params = random_params(model)
  before, each = run(model, params, TOKENS), {}
  for changed in (1, 6, 11):
    each[changed] = TOKENS.copy()
    each[changed][:, changed] = (TOKENS[:, changed] + 1) % STUDY.vocab
  logits = jnp.split(run(model, params, np.concatenate(list(each.values()))), len(each))
  for changed, after in zip(each, logits, strict=True):
    np.testing.assert_allclose(after[:, :changed], before[:, :changed], atol=1e-5)
    assert (np.abs(after - before)[:, changed:].max(axis=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_single_gain_is_the_same_gain_for_every_feature(architecture):
  single = transformer.Transformer(
    dataclasses.replace(ARCHITECTURES[architecture], norm_gain="single")
  )
  params, whole = random_params(single), transformer.Transformer(ARCHITECTURES[architecture])
  spread = jax.tree.map(
    lambda leaf, shape: jnp.broadcast_to(leaf, shape.shape), params, transformer.shapes(whole)
  )
  norms = [path for path in leaves_by_path(params) if path.endswith("norm/gain")]
  assert len(norms) == (5 if architecture == "olmo2" else 3)
  assert all(leaves_by_path(params)[path].shape[-1] == 1 for path in norms)
  np.testing.assert_allclose(
    single.apply({"params": params}, TOKENS), whole.apply({"params": spread}, TOKENS), rtol=1e-6
  )


def test_positions_count_by_their_distance():
  model = transformer.Transformer(OLMO2)
  params = random_params(model)
  steps = np.arange(TOKENS.shape[1])

  def given(positions):
    return run(model, params, TOKENS, None, positions)

  default = run(model, params, TOKENS)
  np.testing.assert_allclose(given(steps), default, atol=1e-4)
  np.testing.assert_allclose(given(np.stack([steps, steps + 5])), default, atol=1e-4)
  assert np.abs(given(3 * steps) - default).max() > 1e-2


class Dot(nn.Module):
  """lax.dot_general times `factor`, which it also sows: stands for a quantized product."""

  factor: float

  @nn.compact
  def __call__(self, lhs, rhs, dimension_numbers):
    self.sow("statistics", "rows", jnp.full((2,), self.factor))
    return self.factor * jax.lax.dot_general(lhs, rhs, dimension_numbers)


def same(path):
  del path
  return dots[0]


def by_depth(path):
  """Two kinds of depth, so as many scans, both of which compute the same."""
  return dots[not path.startswith("layers/0/")] if path.startswith("layers") else None


dots = [lambda: Dot(1.0), lambda: Dot(1.0)]


@pytest.mark.slow
def test_depths_that_differ_compute_on_the_same_tree():
  uniform, differing = transformer.Transformer(STUDY), transformer.Transformer(STUDY, by_depth)
  params = random_params(uniform)
  assert jax.tree.map(jnp.shape, nn.unbox(transformer.boxed_shapes(differing))) == jax.tree.map(
    jnp.shape, params
  )
  assert transformer.axes(differing) == transformer.axes(uniform)
  assert_trees_near(loss_and_grads(differing, params), loss_and_grads(uniform, params), 1e-5)

  def intermediates(model):
    def capture(module, method):
      return module.name in ("mlp_add", "attention_add", "final_norm") and method == "__call__"

    return run(model, params, TOKENS, mutable=["intermediates"], capture_intermediates=capture)[1]

  seen = intermediates(differing)
  assert_trees_near(seen, intermediates(uniform), 1e-5)
  assert seen["intermediates"]["layers"]["mlp_add"]["__call__"][0].shape == (3, 2, 12, 24)


def test_depths_get_the_dot_general_of_their_own_path():
  plain = transformer.Transformer(LLAMA)  # a norm behind the layer would undo a factor
  params = random_params(plain)
  doubled = functools.partial(Dot, 2.0)
  actual = run(
    transformer.Transformer(LLAMA, lambda path: doubled if path == "layers/1/mlp/down" else None),
    params,
    TOKENS,
  )
  unchanged = run(plain, params, TOKENS)
  kernel = params["layers"]["mlp"]["down"]["kernel"]
  params["layers"]["mlp"]["down"]["kernel"] = kernel.at[1].multiply(2)
  np.testing.assert_allclose(actual, run(plain, params, TOKENS), atol=1e-5)
  assert np.abs(actual - unchanged).max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_is_asked_for(architecture):
  c = ARCHITECTURES[architecture]
  asked = set()
  model = transformer.Transformer(c, lambda path: asked.add(path))
  shapes = nn.unbox(transformer.boxed_shapes(model))
  kernels = [path.removesuffix("/kernel") for path in paths(shapes) if path.endswith("/kernel")]
  expected = {
    path.replace("layers/", f"layers/{depth}/") for path in kernels for depth in range(c.blocks)
  } | {"head"}
  assert asked == expected


@pytest.mark.parametrize("architecture", ["study", "olmo2"])  # tied and not
def test_the_head_has_its_own_dot_general(architecture):
  c = ARCHITECTURES[architecture]
  plain = transformer.Transformer(c)
  params = random_params(plain)
  tripled = transformer.Transformer(c, lambda path: (lambda: Dot(3.0)) if path == "head" else None)
  np.testing.assert_allclose(
    run(tripled, params, TOKENS), 3 * run(plain, params, TOKENS), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(("remat", "unroll"), [("none", 1), ("none", 0), ("full", 1)])
def test_what_a_module_sows_comes_back_stacked(remat, unroll):
  model = transformer.Transformer(dataclasses.replace(STUDY, remat=remat, unroll=unroll), same)
  params = random_params(model)
  sown = run(model, params, TOKENS, mutable=["statistics"])[1]["statistics"]
  leaves = paths(sown["layers"])
  assert len(leaves) == len(linears.linear_paths(STUDY))
  assert {leaf.shape for leaf in leaves.values()} == {(3, 2)}


def test_what_depths_that_differ_sow_comes_back_in_order():
  kinds = [lambda: Dot(1.0), lambda: Dot(2.0)]
  model = transformer.Transformer(
    STUDY, lambda path: kinds[path.startswith("layers/2/")] if path != "head" else None
  )
  sown = run(model, random_params(model), TOKENS, mutable=["statistics"])[1]["statistics"]
  for leaf in jax.tree.leaves(sown):
    np.testing.assert_array_equal(leaf, [[1, 1], [1, 1], [2, 2]])


def test_depths_that_sow_nothing_hold_nan():
  kinds = {
    "layers/0/mlp/up": lambda: Dot(1.0),
    "layers/2/mlp/up": lambda: Dot(2.0),
    "layers/2/mlp/down": lambda: Dot(3.0),
  }
  model = transformer.Transformer(STUDY, kinds.get)
  shapes = nn.unbox(transformer.boxed_shapes(model))  # modules sow while they are initialised, too
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
    jnp.shape, random_params(transformer.Transformer(STUDY))
  )
  sown = run(model, random_params(model), TOKENS, mutable=["statistics"])[1]["statistics"][
    "layers"
  ]["mlp"]
  up, down = jax.tree.leaves(sown["up"]), jax.tree.leaves(sown["down"])
  np.testing.assert_array_equal(up, [[[1, 1], [np.nan] * 2, [2, 2]]])
  np.testing.assert_array_equal(down, [[[np.nan] * 2, [np.nan] * 2, [3, 3]]])


@pytest.mark.parametrize(
  ("remat", "unroll"),
  [("none", 2), ("none", 0), *((name, 1) for name in stack.POLICIES), ("full", 0)],
)
def test_remat_and_unroll_change_nothing(remat, unroll):
  plain = transformer.Transformer(STUDY)
  params = random_params(plain)
  other = transformer.Transformer(dataclasses.replace(STUDY, remat=remat, unroll=unroll))
  assert jax.tree.map(jnp.shape, nn.unbox(transformer.boxed_shapes(other))) == jax.tree.map(
    jnp.shape, params
  )
  assert_trees_near(loss_and_grads(other, params), loss_and_grads(plain, params), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_recomputes(dtype):
  """Policies differ in the dots of the backward pass: all are saved, those of linear layers, or
  none."""

  def dots(remat):
    model = transformer.Transformer(dataclasses.replace(STUDY, remat=remat, dtype=dtype))
    params = nn.unbox(transformer.boxed_shapes(model))
    return str(jax.make_jaxpr(lambda params: loss_and_grads(model, params))(params)).count(
      "dot_general["
    )

  assert dots("none") == dots("dots") < dots("dots_with_no_batch_dims") < dots("full")


def test_the_program_does_not_grow_with_depth():
  def size(blocks):
    model = transformer.Transformer(dataclasses.replace(STUDY, blocks=blocks))
    params = nn.unbox(transformer.boxed_shapes(model))
    return len(jax.jit(lambda params: loss_and_grads(model, params)).lower(params).as_text())

  assert size(24) == pytest.approx(size(4), rel=0.05)


LINEAR, VECTOR = Axes((0,), (1,), (2,)), Axes((0,), (), (1,))
STUDY_AXES = {
  "embedding": Axes((), (1,), (0,)),
  "final_norm/gain": Axes((), (), (0,)),
  "layers/attention/q/kernel": LINEAR,
  "layers/attention/k/kernel": LINEAR,
  "layers/attention/v/kernel": LINEAR,
  "layers/attention/o/kernel": LINEAR,
  "layers/attention/scale": VECTOR,
  "layers/attention_norm/gain": VECTOR,
  "layers/mlp/up/kernel": LINEAR,
  "layers/mlp/down/kernel": LINEAR,
  "layers/mlp_norm/gain": VECTOR,
}
LLAMA_AXES = {
  path: axes for path, axes in STUDY_AXES.items() if path != "layers/attention/scale"
} | {"layers/mlp/gate/kernel": LINEAR, "head/kernel": Axes((), (0,), (1,))}
OLMO2_AXES = LLAMA_AXES | {
  "layers/attention/q_norm/gain": VECTOR,
  "layers/attention/k_norm/gain": VECTOR,
}


@pytest.mark.parametrize(
  ("architecture", "expected"),
  [("study", STUDY_AXES), ("olmo2", OLMO2_AXES), ("llama", LLAMA_AXES)],
)
def test_axes_come_from_the_logical_names(architecture, expected):
  model = transformer.Transformer(ARCHITECTURES[architecture])
  assert paths(transformer.axes(model), is_leaf=lambda x: isinstance(x, Axes)) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_depth_is_the_first_axis_of_every_layer_parameter(architecture):
  model = transformer.Transformer(ARCHITECTURES[architecture])
  boxes = paths(transformer.boxed_shapes(model), is_leaf=lambda x: isinstance(x, nn.Partitioned))
  for path, box in boxes.items():
    assert len(box.names) == box.value.ndim, path
    assert (box.names[0] == "layers") == path.startswith("layers/"), path
    assert "layers" not in box.names[1:], path
    if path.startswith("layers/"):
      assert box.value.shape[0] == STUDY.blocks, path


def test_initial_parameters():
  c = dataclasses.replace(
    config.resolve(adamw.get_config("50m")).model,
    vocab=64,
    blocks=2,
    heads=3,
    kv_heads=1,
    d_head=64,
    d_model=192,
    mlp_hidden=768,
  )
  init = jax.jit(lambda seed: transformer.init(transformer.Transformer(c), seed))
  params = paths(init(0))
  for path, x in params.items():
    assert x.dtype == jnp.float32, path
    if path.endswith("gain"):
      assert (x == 1).all(), path
    elif path.endswith("scale"):
      np.testing.assert_allclose(x, 8.0)
    else:
      np.testing.assert_allclose([x.mean(), x.std()], [0, 0.02], atol=1e-3, err_msg=path)
  q = params["layers/attention/q/kernel"]
  assert not np.array_equal(q[0], q[1])
  assert np.array_equal(q, init(0)["layers"]["attention"]["q"]["kernel"])
  assert not np.array_equal(q, init(1)["layers"]["attention"]["q"]["kernel"])


@pytest.mark.parametrize(
  ("size", "total", "embedding"),
  [
    ("50m", 49_748_760, 24_576_000),
    ("125m", 121.8e6, 32000 * 9 * 128),
    ("350m", 351.2e6, 32000 * 12 * 128),
    ("500m", 502.2e6, 32000 * 12 * 128),
    ("760m", 769.3e6, 32000 * 15 * 128),
    ("1.5b", 1489e6, 32000 * 18 * 128),
  ],
)
def test_parameter_counts_of_the_study(size, total, embedding):
  model = transformer.Transformer(config.resolve(adamw.get_config(size)).model)
  counts = transformer.count(nn.unbox(transformer.boxed_shapes(model)))
  # The precision to which the study's total is known.
  digits = 1 if size == "50m" else 1e6 if size == "1.5b" else 1e5
  assert round(counts["total"] / digits) * digits == pytest.approx(total, abs=digits / 2)
  assert counts["embedding"] == embedding
  assert counts["other"] == counts["total"] - embedding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_for_the_matrices_only(architecture):
  c = ARCHITECTURES[architecture]
  exact = transformer.Transformer(c)
  params = random_params(exact)
  model = transformer.Transformer(dataclasses.replace(c, dtype="bfloat16"))
  assert {leaf.dtype for leaf in jax.tree.leaves(nn.unbox(transformer.boxed_shapes(model)))} == {
    jnp.dtype("float32")
  }
  logits, seen = run(
    model,
    params,
    TOKENS,
    mutable=["intermediates"],
    capture_intermediates=lambda module, _: module.name in ("mlp_add", "q_norm", "mlp_norm"),
  )
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype("float32")}
  reference = run(exact, params, TOKENS)
  error = np.abs(logits - reference).max() / np.abs(reference).max()
  assert 1e-5 < error < 0.05  # it is used, and does no more harm than it should
  inputs = set()

  def watched(lhs, rhs, dimension_numbers):
    inputs.add(lhs.dtype)
    return jax.lax.dot_general(
      lhs, rhs.astype(lhs.dtype), dimension_numbers, preferred_element_type=jnp.float32
    )

  watching = transformer.Transformer(model.config, lambda path: lambda: watched)
  jax.eval_shape(lambda params: watching.apply({"params": params}, TOKENS), params)
  assert inputs == {jnp.dtype("bfloat16")}
  results = jax.eval_shape(lambda params: loss_and_grads(model, params), params)
  assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("float32")}


def test_logits_of_hidden_are_the_models():
  model = transformer.Transformer(OLMO2)
  params = random_params(model)
  hidden = run(model, params, TOKENS, method="hidden")
  assert hidden.shape == (2, 12, 24)
  logits = run(model, params, hidden.reshape(-1, 24), method="logits")
  np.testing.assert_allclose(
    logits.reshape(2, 12, 40), run(model, params, TOKENS), rtol=1e-5, atol=1e-5
  )
