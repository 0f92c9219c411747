"""Muon against KellerJordan's and torch's, thirty steps on fixed gradients, and against optax's.

tests/golden/muon_kj_*.npz: SingleDeviceMuonWithAuxAdam (857d1ad) with lr 0.02, momentum 0.95, decay
0.1, Adam's lr 3e-3 on the bias and the embedding; muon_torch_*.npz: torch.optim.Muon 2.13 with the
same numbers. ns-bf16: as published; f64: Newton-Schulz in float64. Matrices are [fan-out, fan-in]
there. Snapshots between the first and the last are in float32, exact to 6e-8.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config
from beyond_outliers.mesh import make_mesh
from beyond_outliers.optim.muon import muon, scale_by_muon
from beyond_outliers.params import Axes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MATRIX = Axes(fan_in=(1,), fan_out=(0,))
AXES = {"w1": MATRIX, "w2": MATRIX, "b": Axes(fan_out=(0,)), "emb": Axes(fan_out=(0, 1))}
STEPS = (1, 2, 5, 10, 11, 20, 30)
# How far the official code's own runs are from its float64 one after 30 steps: bfloat16 iterations,
# and float32 throughout.
BFLOAT16_DEVIATION = {"w1": 2.22e-3, "w2": 1.89e-3}
FLOAT32_DEVIATION = {"w1": 2.7e-7, "w2": 3.8e-7, "b": 1.18e-6, "emb": 1.34e-7}


def trajectory(keys, dtype, **hyper):
  """{step: parameters}, float64 numpy."""
  problem = np.load(GOLDEN / "problem.npz")
  params = {key: jnp.asarray(problem[f"p0_{key}"], dtype) for key in keys}
  gradients = {key: jnp.asarray(problem[f"g_{key}"], dtype) for key in keys}
  tx = muon(0.02, axes=AXES, momentum=0.95, weight_decay=0.1, adam_learning_rate=3e-3, **hyper)

  def step(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  _, after = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, gradients)
  return {
    number: {key: np.asarray(after[key][number - 1], np.float64) for key in keys}
    for number in STEPS
  }


@pytest.mark.parametrize(
  "name, keys, hyper",
  [
    ("muon_kj_ns-f64_f64", ("w1", "w2", "b", "emb"), {}),
    # torch divides by the norm, where the others divide by the norm + 1e-7.
    ("muon_torch_original_f64", ("w1", "w2"), {"scale": "original", "ns_eps": 0.0}),
    ("muon_torch_match_rms_adamw_f64", ("w1", "w2"), {"scale": "match_rms_adamw", "ns_eps": 0.0}),
  ],
)
def test_the_trajectory_is_the_official_one(name, keys, hyper):
  golden = np.load(GOLDEN / f"{name}.npz")
  with jax.enable_x64(True):
    ours = trajectory(keys, jnp.float64, ns_dtype="float64", **hyper)
  for number, params in ours.items():
    for key, value in params.items():
      expected = golden[f"s{number:02d}_{key}"]
      tolerance = 1e-13 if expected.dtype == np.float64 else 6e-8
      np.testing.assert_allclose(
        value,
        expected,
        rtol=0,
        atol=tolerance * abs(expected).max(),
        err_msg=f"step {number}, {key}",
      )


def test_float32_stays_as_close_as_the_official_one_does():
  golden, ours = (
    np.load(GOLDEN / "muon_kj_ns-f64_f64.npz"),
    trajectory(AXES, jnp.float32, ns_dtype=None)[30],
  )
  for key, deviation in FLOAT32_DEVIATION.items():
    np.testing.assert_allclose(ours[key], golden[f"s30_{key}"], rtol=0, atol=2 * deviation)


def test_bfloat16_iterations_stay_as_close_as_the_official_ones_do():
  exact, published = (
    np.load(GOLDEN / f"muon_kj_ns-{name}.npz") for name in ("f64_f64", "bf16_f32")
  )
  ours = trajectory(AXES, jnp.float32)[30]  # bfloat16 is the default
  for key, deviation in BFLOAT16_DEVIATION.items():
    np.testing.assert_allclose(ours[key], exact[f"s30_{key}"], rtol=0, atol=deviation)
    np.testing.assert_allclose(ours[key], published[f"s30_{key}"], rtol=0, atol=2 * deviation)
  assert abs(ours["w1"] - exact["s30_w1"]).max() > 100 * FLOAT32_DEVIATION["w1"]


def steps(tx, params, count=3, seed=1):
  """Updates of the last of some steps on random gradients, each leaf's own by its path, and the
  state."""
  state, update = tx.init(params), jax.jit(tx.update)
  for number in range(count):
    updates, state = update(noise(params, seed + number), state, params)
  return updates, state


def noise(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale, consistent_rms", [("original", None), ("match_rms_adamw", 0.2)])
def test_with_nesterov_bias_correction_it_is_optaxs(nesterov, scale, consistent_rms):
  """optax.contrib.muon takes axis 0 as fan-in, as our default axes do."""
  with jax.enable_x64(True):
    params = noise({"tall": jnp.zeros((7, 4)), "wide": jnp.zeros((3, 8))}, 0)
    hyper = dict(nesterov=nesterov, scale=scale, weight_decay=0.2, ns_dtype=None, ns_eps=1e-8)
    ours, _ = steps(muon(0.1, nesterov_bias_correction=True, **hyper), params)
    plain, _ = steps(muon(0.1, **hyper), params)
    theirs, _ = steps(
      optax.contrib.muon(0.1, nesterov=nesterov, weight_decay=0.2, consistent_rms=consistent_rms),
      params,
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), ours, theirs)
    assert (
      abs(plain["wide"] - theirs["wide"]).max() > 1e-4
    ) == nesterov  # without Nesterov only a length is corrected


def blocks_of(state):
  return [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if "blocks" in jax.tree_util.keystr(path)
  ]


TREE = {
  "layers": {"kernel": (3, 4, 6), "gain": (3, 4)},
  "qkv": (4, 2, 3),
  "row": (1, 5),
  "tall": (9, 4),
  "scale": (),
}
TREE_AXES = {
  "layers": {"kernel": Axes((0,), (1,), (2,)), "gain": Axes((0,), (), (1,))},
  "qkv": Axes((), (0,), (1, 2)),
  "row": Axes((), (0,), (1,)),
  "tall": Axes((), (0,), (1,)),
  "scale": Axes(),
}
F32 = dict(ns_dtype="float32", weight_decay=0.1, adam_learning_rate=0.01)


def tree(dtype=jnp.float32):
  return noise(
    jax.tree.map(
      lambda shape: jnp.zeros(shape, dtype), TREE, is_leaf=lambda x: isinstance(x, tuple)
    ),
    0,
  )


def test_a_stacked_leaf_updates_as_its_slices_do():
  params = {"kernel": tree()["layers"]["kernel"]}
  apart = {f"{i}": params["kernel"][i] for i in range(3)}
  gradients = noise(params, 1)
  stacked, separate = (muon(0.1, **F32) for _ in range(2))
  updates, _ = stacked.update(gradients, stacked.init(params), params)
  slices, _ = separate.update(
    {f"{i}": gradients["kernel"][i] for i in range(3)}, separate.init(apart), apart
  )
  for i in range(3):
    np.testing.assert_allclose(updates["kernel"][i], slices[f"{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_orientation_comes_from_the_axes(scale):
  """A leaf that lies transposed, with transposed axes, updates transposed; the factor tells fan-in
  from fan-out."""
  params = {"w": tree()["tall"]}
  gradients, flip = noise(params, 1), lambda t: {"w": t["w"].T}

  def update(axes, g, p):
    tx = muon(0.1, axes={"w": axes}, scale=scale, **F32)
    return tx.update(g, tx.init(p), p)[0]

  one, other = Axes((), (0,), (1,)), Axes((), (1,), (0,))
  np.testing.assert_allclose(
    update(one, gradients, params)["w"].T,
    update(other, flip(gradients), flip(params))["w"],
    atol=1e-6,
  )
  swapped = update(other, gradients, params)["w"]
  assert np.allclose(swapped, update(one, gradients, params)["w"], atol=1e-6) == (
    scale == "match_rms_adamw"
  )


def test_eight_devices_update_as_one_does():
  """Whole blocks to a device: the matrices' buckets hold 3, 1, 1 and 1 blocks, padded to 8."""
  mesh, params = make_mesh(config.Mesh(2, 2, 2)), tree()
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  one, _ = steps(muon(0.1, axes=TREE_AXES, **F32), params)
  eight, state = steps(
    muon(0.1, axes=TREE_AXES, mesh=mesh, **F32), jax.device_put(params, everywhere)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), eight, one)
  assert (
    all(x.shape[0] == 8 and np.isfinite(x).all() for x in blocks_of(state))
    and len(blocks_of(state)) == 3
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_gradients_move_nothing_and_dtypes_stay(dtype):
  params, tx = tree(dtype), muon(0.1, axes=TREE_AXES)
  state = tx.init(params)
  updates, after = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
  jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, np.zeros(p.shape)), updates, params)
  assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert {x.dtype.name for x in blocks_of(state)} == {"float32"}


def test_only_matrices_are_orthogonalised():
  """The others take Adam's first step, its learning rate in the gradient's direction, at their own
  schedule."""
  params = tree()
  tx = muon(
    0.1,
    axes=TREE_AXES,
    ns_dtype="float32",
    adam_learning_rate=lambda count: jnp.where(count < 1, 0.03, 0.0),
  )
  gradients, state = noise(params, 1), tx.init(params)
  updates, state = tx.update(gradients, state, params)
  for path in (lambda t: t["layers"]["gain"], lambda t: t["scale"]):
    np.testing.assert_allclose(path(updates), -0.03 * np.sign(path(gradients)), rtol=1e-4)
  # Five quintic steps leave singular values between about 0.7 and 1.2.
  lengths = np.linalg.svd(updates["qkv"].reshape(4, 6), compute_uv=False) / (0.1 * np.sqrt(6 / 4))
  assert lengths.min() > 0.6 and lengths.max() < 1.3
  updates, _ = tx.update(gradients, state, params)
  assert not updates["scale"] and abs(updates["row"]).max() > 0


@pytest.mark.parametrize("kept", ["gain", "kernel"])
def test_one_kind_alone_and_masked_leaves(kept):
  """Groups mask what is not theirs: a group may hold matrices only, or none."""
  params = tree()["layers"]
  masked = {key: x if key == kept else optax.MaskedNode() for key, x in params.items()}
  tx = muon(0.1, axes=TREE_AXES["layers"], **F32)
  updates, _ = tx.update(masked, tx.init(masked), masked)
  alone = muon(0.1, axes={kept: TREE_AXES["layers"][kept]}, **F32)
  expected, _ = alone.update(
    {kept: params[kept]}, alone.init({kept: params[kept]}), {kept: params[kept]}
  )
  np.testing.assert_array_equal(updates[kept], expected[kept])
  assert jax.tree.structure(updates) == jax.tree.structure(masked)


def test_without_momentum_nothing_is_kept():
  params = {"w": tree()["tall"]}
  first, state = steps(scale_by_muon(momentum=0.0, ns_dtype=None), params, count=1, seed=3)
  again, _ = steps(scale_by_muon(momentum=0.0, ns_dtype=None), params, count=3, seed=1)
  assert [x.shape for x in jax.tree.leaves(state)] == [()]
  np.testing.assert_array_equal(first["w"], again["w"])  # only the last gradient counts


def test_decay_reaches_every_leaf_and_is_decoupled():
  params, tx = (
    tree(),
    muon(0.1, axes=TREE_AXES, weight_decay=0.5, adam_learning_rate=0.01, scale="match_rms_adamw"),
  )
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["tall"], -0.1 * 0.5 * params["tall"], rtol=1e-6)
  np.testing.assert_allclose(updates["scale"], -0.01 * 0.5 * params["scale"], rtol=1e-6)


def test_newton_schulz_is_as_asked_for():
  """Steps and table change the direction; iterating on the Gram matrix only its rounding."""
  with jax.enable_x64(True):
    params = {"w": tree(jnp.float64)["tall"]}

    def update(**hyper):
      return steps(scale_by_muon(ns_dtype="float64", **hyper), params)[0]["w"]

    plain = update()
    np.testing.assert_allclose(update(ns_gram=True), plain, atol=1e-10)
    assert not (update(ns_gram=True) == plain).all()
    for other in (
      dict(ns_steps=4),
      dict(ns_coefficients="polar_express"),
      dict(ns_coefficients=((1.5, -0.5, 0.0),) * 5),
    ):
      assert abs(update(**other) - plain).max() > 1e-3


def test_floats_may_be_injected():
  params = tree()
  tx = optax.inject_hyperparams(muon)(
    learning_rate=lambda count: 0.1 / (1 + count), axes=TREE_AXES, **F32
  )
  fixed = muon(lambda count: 0.1 / (1 + count), axes=TREE_AXES, **F32)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    steps(tx, params)[0],
    steps(fixed, params)[0],
  )


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(scale="orginal"), "scale = 'orginal': did you mean 'original'"),
    (dict(ns_dtype="float16"), "ns_dtype = 'float16'"),
    (dict(ns_coefficients="quintc"), "ns_coefficients = 'quintc': did you mean 'quintic'"),
    (dict(ns_steps=0), "ns_steps = 0: expected at least 1"),
    (dict(momentum=1.0), "momentum = 1.0"),
    (dict(momentum=-0.1), "momentum = -0.1"),
  ],
)
def test_what_cannot_be_is_refused_when_built(hyper, message):
  with pytest.raises(ValueError, match=message):
    muon(0.1, **hyper)


def test_scale_by_muon_refuses_what_is_no_matrix():
  with pytest.raises(ValueError, match=r"'layers/gain' of shape \(3, 4\) is not a matrix"):
    scale_by_muon(axes=TREE_AXES).init(tree())
