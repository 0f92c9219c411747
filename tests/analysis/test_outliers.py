"""Outlier metrics against scipy and numpy, in float64, on the very tensors that the model's own
modules return."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_models import STUDY

from beyond_outliers import config
from beyond_outliers import mesh as mesh_lib
from beyond_outliers.analysis import outliers
from beyond_outliers.evaluate import outlier_metrics
from beyond_outliers.model import transformer
from beyond_outliers.quant import (
  RECIPES,
  QuantSpec,
  Recipe,
  dequantize,
  dot_general_for,
  quantize_array,
)

MODEL = dataclasses.replace(STUDY, d_head=16, d_model=64, mlp_hidden=96, attention="plain")
DRAW = np.random.default_rng(0)


def batch(rows, padding=0):
  """A batch whose last row ends with `padding` tokens that belong to no document."""
  segments = np.ones((rows, 13), np.int32)
  segments[-1, 13 - padding :] = 0
  return {
    "tokens": DRAW.integers(0, MODEL.vocab, (rows, 13)).astype(np.int32),
    "segment_ids": segments,
    "positions": np.broadcast_to(np.arange(13, dtype=np.int32), (rows, 13)),
  }


BATCHES = [batch(8), batch(8), batch(8, padding=5)]


def random_params(model):
  """Some channels are much larger than others, and have another mean."""
  draw = np.random.default_rng(1)

  def leaf(path, like):
    x = draw.normal(0.5 if like.ndim < 3 else 0, 0.1, like.shape)
    return jnp.asarray(
      x * np.where(np.arange(like.shape[-1]) % 19 == 3, 20, 1) if path[-1].key == "gain" else x,
      like.dtype,
    )

  return jax.tree_util.tree_map_with_path(leaf, transformer.shapes(model))


def test_no_batch_and_parameters_of_another_model_are_refused():
  model = transformer.Transformer(MODEL)
  deeper = transformer.Transformer(dataclasses.replace(MODEL, blocks=MODEL.blocks + 1))
  with pytest.raises(config.ConfigError, match=r"batches = \[\]: expected at least one"):
    outliers.measure(model, random_params(model), [])
  with pytest.raises(config.ConfigError, match=r"params: .*: model.config makes it"):
    outliers.measure(model, random_params(deeper), BATCHES)
  with pytest.raises(config.ConfigError, match="batches = -99: the model knows tokens below"):
    outliers.measure(
      model, random_params(model), [{**BATCHES[0], "tokens": BATCHES[0]["tokens"] - 99}]
    )


def expected(x, spec=outliers.ACTIVATIONS):
  """All metrics of x [tokens, features] by their definitions."""
  x32, x = np.asarray(x, np.float32), np.asarray(x, np.float64)
  magnitude, rms = np.abs(x), np.sqrt(np.mean(x**2, axis=0))
  median = np.median(magnitude, axis=1)
  some = magnitude.max(axis=1) > 0
  rounded = np.asarray(dequantize(quantize_array(jnp.asarray(x32), spec)), np.float64)
  return {
    "max_to_median": np.mean(magnitude.max(axis=1)[median > 0] / median[median > 0]),
    "max_to_mean": np.mean(magnitude.max(axis=1)[some] / magnitude.mean(axis=1)[some]),
    "kurtosis": stats.kurtosis(x, axis=None),
    "rms_kurtosis": stats.kurtosis(rms),
    "outlier_channels": np.mean(rms > 6 * np.median(rms)),
    "sqnr": 10 * np.log10(np.sum(x**2) / np.sum((x - rounded) ** 2)),
    "zero_medians": np.mean(median == 0),
  }


def heavy(tokens, features, mean=0.0):
  x = DRAW.standard_t(3, (tokens, features)) + mean
  x[:, 1] *= 30
  return x.astype(np.float32)


@pytest.mark.parametrize("features", [64, 65, 1])
def test_the_metrics_are_numpy_s_and_scipy_s(features):
  x = heavy(200, max(features, 2))[:, :features]
  want = expected(x)
  for name in outliers.METRICS if features > 1 else ("max_to_median", "max_to_mean", "kurtosis"):
    function = getattr(outliers, name)
    got = function(x, outliers.ACTIVATIONS) if name == "sqnr" else function(x)
    np.testing.assert_allclose(got, want[name], rtol=2e-6, err_msg=name)
  assert features == 1 or 0 < want["outlier_channels"] < 0.05


def test_tokens_whose_median_is_zero_have_no_ratio_to_it():
  x = np.array([[0, 0, 0, 5.0], [1, 0, 3, 4], [0, 0, 0, 0]], np.float32)
  np.testing.assert_allclose(outliers.max_to_median(x), 4 / 2)
  np.testing.assert_allclose(outliers.max_to_mean(x), (4 + 2) / 2)
  assert np.isnan(outliers.max_to_median(x[:1]))


@pytest.mark.parametrize("features", [8, 5000])
def test_a_nan_is_in_every_metric(features):
  x = heavy(4, features)
  x[1, 3] = np.nan
  whole = outlier_metrics.metrics_of(
    jax.tree.map(np.asarray, outlier_metrics.statistics(x, np.ones(4, bool), outliers.ACTIVATIONS))
  )
  for name in outliers.METRICS:
    function = getattr(outliers, name)
    found = function(x, outliers.ACTIVATIONS) if name == "sqnr" else function(x)
    assert np.isnan(found) and np.isnan(whole[name]), name


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_streaming_is_the_whole(mean):
  """For parts of unequal lengths, some of whose tokens don't count; also where sums of powers about
  zero would suffer from cancellation."""
  x = heavy(700, 48, mean)
  counts = np.ones(700, bool)
  counts[[5, 100, 101, 699]] = False
  x[~counts] = 1e6
  step = jax.jit(outliers.statistics, static_argnums=2)
  parts = [
    {"some": step(x[a:b], counts[a:b], outliers.ACTIVATIONS)}
    for a, b in ((0, 5), (5, 6), (6, 400), (400, 700))
  ]
  got = outliers.collect(parts).iloc[0]
  assert got.tokens == 696
  want = expected(x[counts])
  # In float32, values of 1000 ± 1 have rounding errors of their own.
  assert got[list(want)].to_dict() == pytest.approx(want, rel=2e-6 if not mean else 2e-4)


def seen(model, params, tokens):
  """{path: [tokens, features]} of every site, from flax's own record of what modules return, and
  the layers' own equations."""
  c = model.config
  _, state = jax.jit(
    lambda params, tokens: model.apply(
      {"params": params}, tokens, capture_intermediates=True, mutable=["intermediates"]
    )
  )(params, tokens)
  got = state["intermediates"]

  def rows(x):
    return np.asarray(x).reshape(-1, x.shape[-1])

  stream = params["embedding"][tokens]
  sites = {"embedding": rows(stream), "head": rows(got["final_norm"]["__call__"][0])}
  for depth in range(c.blocks):

    def of(*path, depth=depth):
      return _at(got["layers"], path)["__call__"][0][depth]

    add, after = of("attention_add"), of("mlp_add")
    for name in "qkv":
      sites[f"layers/{depth}/attention/{name}"] = rows(stream)
    sites[f"layers/{depth}/attention_add"] = sites[f"layers/{depth}/mlp/up"] = rows(add)
    sites[f"layers/{depth}/mlp/down"] = rows(of("mlp", "activation"))
    sites[f"layers/{depth}/mlp_add"] = rows(after)
    # The only input that no module returns: it is computed from the layer's output.
    kernel = params["layers"]["attention"]["o"]["kernel"][depth]
    sites[f"layers/{depth}/attention/o"] = rows(
      np.linalg.lstsq(kernel.T.astype(np.float64), rows(of("attention", "o")).T)[0].T
    )
    stream = after
  return sites


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


@pytest.fixture(scope="module")
def measured():
  model = transformer.Transformer(MODEL)
  params = random_params(model)
  return model, params, outliers.measure(model, params, BATCHES).set_index("path")


def test_every_site_of_the_model_is_measured(measured):
  model, params, frame = measured
  whole = {name: np.concatenate([b[name] for b in BATCHES]) for name in ("tokens", "segment_ids")}
  counts = whole["segment_ids"].reshape(-1) > 0
  sites = seen(model, params, whole["tokens"])
  assert (
    set(frame.index) == set(sites) and frame.index[0] == "embedding" and frame.index[-1] == "head"
  )
  for path, x in sites.items():
    want = expected(x[counts].astype(np.float32))
    # The input of the output projection is solved for, not seen, and a rounding flips with its last
    # bit.
    loose = {"rel": 1e-3, "abs": 1e-3} if path.endswith("/o") else {"rel": 1e-5, "abs": 1e-5}
    if MODEL.mlp == "relu2" and path.endswith("down"):
      want.pop("max_to_median"), want.pop("zero_medians")  # a hair above zero or below decides
    assert frame.loc[path, list(want)].to_dict() == pytest.approx(want, **loose), path
  assert set(frame.tokens) == {3 * 8 * 13 - 5}
  assert (
    frame.kind["layers/1/mlp/down"] == "activation" and frame.kind["layers/1/mlp/up"] == "linear"
  )
  assert frame.depth["layers/1/mlp_add"] == 1 and np.isnan(frame.depth["head"])


def assert_frames_near(a, b, tolerance=1e-4):
  numbers = [*outliers.METRICS[1:], "tokens"]
  assert list(a.index) == list(b.index)
  np.testing.assert_allclose(
    a[numbers].to_numpy(float), b[numbers].to_numpy(float), rtol=tolerance, atol=tolerance
  )


def test_unrolled_and_rematerialised_is_one_with_scanned(measured):
  _, params, frame = measured
  model = transformer.Transformer(dataclasses.replace(MODEL, unroll=0, remat="full"))
  assert_frames_near(outliers.measure(model, params, BATCHES).set_index("path"), frame)


def test_eight_devices_are_one_with_one(measured):
  model, params, frame = measured
  mesh = mesh_lib.make_mesh(config.Mesh(2, 2, 2))
  shardings = mesh_lib.shardings(transformer.boxed_shapes(model), mesh)
  with mesh_lib.use(mesh):
    split = jax.device_put(params, shardings)
    batches = [mesh_lib.put_batch(b, mesh, 8) for b in BATCHES]
    assert_frames_near(outliers.measure(model, split, batches).set_index("path"), frame)
    assert_frames_near(
      outliers.weights(split).set_index("path"), outliers.weights(params).set_index("path")
    )


def test_a_model_under_recipes_has_the_same_sites(measured):
  """Rules by depth make several scans. The first block, in full precision, sees what it saw; what
  follows does not."""
  _, params, frame = measured
  rules = Recipe((("layers/0/.*", None), ("head", None), (".*", RECIPES["quest_w4a4"].default)))
  model = transformer.Transformer(MODEL, dot_general_for(rules, "jax"))
  quantized = outliers.measure(model, params, BATCHES).set_index("path")
  first = [path for path in frame.index if path.startswith("layers/0")]
  assert_frames_near(quantized.loc[first], frame.loc[first])
  assert list(quantized.index) == list(frame.index)
  assert abs(quantized["kurtosis"]["head"] - frame["kurtosis"]["head"]) > 1e-3


def test_an_untied_head_and_gated_mlp_are_measured():
  model = transformer.Transformer(dataclasses.replace(MODEL, tied=False, mlp="swiglu", blocks=1))
  params = random_params(model)
  paths = set(outliers.measure(model, params, BATCHES[:1]).path)
  assert {"head", "embedding", "layers/0/mlp/gate"} <= paths and len(paths) == 2 + 4 + 3 + 2
  assert "head" in set(outliers.weights(params).path)


def test_weights_are_measured_along_what_they_sum_over(measured):
  _, params, _ = measured
  frame = outliers.weights(params).set_index("path")
  assert set(frame.kind) == {"weights"} and len(frame) == 1 + 2 * 6
  for path, w_OxI in (
    ("embedding", params["embedding"]),
    ("layers/1/mlp/up", params["layers"]["mlp"]["up"]["kernel"][1].T),
    ("layers/0/attention/o", params["layers"]["attention"]["o"]["kernel"][0].T),
  ):
    want = expected(np.asarray(w_OxI), outliers.WEIGHTS)
    assert frame.loc[path, list(want)].to_dict() == pytest.approx(want, rel=1e-5), path


def test_the_signal_is_what_a_spec_leaves_of_it():
  x = heavy(100, 64)
  for spec in (
    QuantSpec(8, granularity="token"),
    QuantSpec(4, "midrise", "gaussian", "token", rotation="hadamard"),
  ):
    step = jax.jit(outliers.statistics, static_argnums=2)
    got = outliers.collect([{"some": step(x, np.ones(100, bool), spec)}]).sqnr[0]
    assert got == pytest.approx(float(outliers.sqnr(x, spec)), rel=1e-5)


def test_a_row_of_metrics_has_means_by_kind(measured):
  frame = measured[2]
  row = outliers.summary(frame)
  assert row["kurtosis/residual"] == pytest.approx(
    frame["kurtosis"][frame.kind == "residual"].mean()
  )
  assert set(row) == {
    f"{metric}/{kind}"
    for metric in outliers.METRICS
    for kind in ("residual", "linear", "activation")
  }
