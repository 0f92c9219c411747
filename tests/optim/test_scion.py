"""Scion against LIONS-EPFL's and the study's, thirty steps on fixed gradients; its norms, one by
one.

tests/golden/scion_*.npz: LIONS-EPFL/scion (f58a393), lr 2^-10, its momentum 0.1; scion_po380_paper:
SCION of pytorch_optimizer 3.8.0, unconstrained, its momentum 0.05, decay 0.1. Matrices are
[fan-out, fan-in] there. ns-bf16: as published; f64: Newton-Schulz in float64. Snapshots between the
first and the last are in float32, exact to 6e-8.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config
from beyond_outliers.mesh import make_mesh
from beyond_outliers.optim.muon import BlocksState
from beyond_outliers.optim.scion import initialize, scale_by_scion, scion
from beyond_outliers.params import Axes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MATRIX, TRANSPOSED = Axes(fan_in=(1,), fan_out=(0,)), Axes(fan_in=(0,), fan_out=(1,))
STEPS = (1, 2, 5, 10, 11, 20, 30)
README = {
  "w1": dict(norm="spectral", scale=50.0),
  "w2": dict(norm="spectral", scale=50.0),
  "b": dict(norm="rms", scale=50.0),
  "emb": dict(norm="sign", scale=3000.0),
}
NORMS = {
  "w1": dict(norm="spectral", scale=50.0, clamp=True),
  "w2": dict(norm="row", scale=50.0),
  "b": dict(norm="auto", scale=50.0),
  "emb": dict(norm="col", scale=50.0, axes={"emb": TRANSPOSED}),
}
STUDY = {
  "w1": dict(norm="spectral"),
  "w2": dict(norm="spectral"),
  "emb": dict(norm="sign", learning_rate=0.05),
}
LIONS = dict(learning_rate=2**-10, momentum=0.9)
# How far the official code's own runs are from its float64 one after 30 steps: bfloat16 iterations,
# and float32 throughout.
BFLOAT16_DEVIATION = {
  "constrained": {"w1": 6.2e-3, "w2": 3.06e-3},
  "unconstrained": {"w1": 6.3e-3, "w2": 3.09e-3},
}
FLOAT32_DEVIATION = {"w1": 2.87e-7, "w2": 1.61e-7, "b": 3.16e-7, "emb": 1.16e-6}


def partition(groups, **common):
  axes = {"w1": MATRIX, "w2": MATRIX, "emb": MATRIX, "b": Axes(fan_out=(0,))}
  transforms = {key: scion(**{"axes": axes, **common, **own}) for key, own in groups.items()}
  return optax.partition(transforms, {key: key for key in groups})


def trajectory(tx, keys, dtype, after_step=lambda state: state):
  """{step: parameters}, float64 numpy."""
  problem = np.load(GOLDEN / "problem.npz")
  params = {key: jnp.asarray(problem[f"p0_{key}"], dtype) for key in keys}
  gradients = {key: jnp.asarray(problem[f"g_{key}"], dtype) for key in keys}

  def step(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, after_step(state)), params

  _, after = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, gradients)
  return {
    number: {key: np.asarray(after[key][number - 1], np.float64) for key in keys}
    for number in STEPS
  }


def assert_same(ours, name):
  golden = np.load(GOLDEN / f"{name}.npz")
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


@pytest.mark.parametrize(
  "name, groups, constrained",
  [
    ("scion_readme_constrained", README, True),
    ("scion_readme_unconstrained", README, False),
    ("scion_norms_constrained", NORMS, True),
  ],
)
def test_the_trajectory_is_the_official_one(name, groups, constrained):
  with jax.enable_x64(True):
    tx = partition(groups, constrained=constrained, ns_dtype="float64", **LIONS)
    assert_same(trajectory(tx, groups, jnp.float64), f"{name}_ns-f64_f64")


def test_the_trajectory_is_the_studys():
  """The file's library was patched to run Newton-Schulz in float64. It then normalises the average
  of gradients in place, which it does not in bfloat16, on a copy. To compare, we do the same
  after each step."""

  def normalise(state):
    def is_bucket(x):
      return isinstance(x, BlocksState)

    def of_bucket(x):
      if not is_bucket(x):
        return x
      return BlocksState(x.mu / (jnp.linalg.norm(x.mu, axis=(1, 2), keepdims=True) + 1e-7))

    return jax.tree.map(of_bucket, state, is_leaf=is_bucket)

  with jax.enable_x64(True):
    tx = partition(
      STUDY,
      learning_rate=0.02,
      momentum=0.95,
      constrained=False,
      weight_decay=0.1,
      ns_dtype="float64",
    )
    assert_same(trajectory(tx, STUDY, jnp.float64, normalise), "scion_po380_paper_f64")


def test_float32_stays_as_close_as_the_official_one_does():
  golden = np.load(GOLDEN / "scion_readme_constrained_ns-f64_f64.npz")
  ours = trajectory(partition(README, ns_dtype=None, **LIONS), README, jnp.float32)[
    30
  ]  # constrained is the default
  for key, deviation in FLOAT32_DEVIATION.items():
    np.testing.assert_allclose(ours[key], golden[f"s30_{key}"], rtol=0, atol=2 * deviation)


@pytest.mark.parametrize("name", BFLOAT16_DEVIATION)
def test_bfloat16_iterations_stay_as_close_as_the_official_ones_do(name):
  exact, published = (
    np.load(GOLDEN / f"scion_readme_{name}_ns-{kind}.npz") for kind in ("f64_f64", "bf16_f32")
  )
  ours = trajectory(
    partition(README, constrained=name == "constrained", **LIONS), README, jnp.float32
  )[30]
  for key, deviation in BFLOAT16_DEVIATION[name].items():
    np.testing.assert_allclose(ours[key], exact[f"s30_{key}"], rtol=0, atol=deviation)
    np.testing.assert_allclose(ours[key], published[f"s30_{key}"], rtol=0, atol=2 * deviation)


def noise(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)


def direction(gradients, axes=None, **hyper):
  tx = scale_by_scion(axes=axes, ns_dtype=None, **hyper)
  return tx.update(gradients, tx.init(gradients))[0]


KERNEL = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)  # [fan-in, fan-out]


def L2(x, axis):
  return np.sqrt((x * x).sum(axis, keepdims=True))


@pytest.mark.parametrize(
  "hyper, expected",
  [
    (dict(norm="sign"), np.sign(KERNEL) / 4),
    (dict(norm="sign", normalized=False), np.sign(KERNEL)),
    (dict(norm="col"), KERNEL / L2(KERNEL, 1) * 6**0.5),
    (dict(norm="col", normalized=True), KERNEL / L2(KERNEL, 1) * 6**0.5 / 4),
    (dict(norm="row"), KERNEL / L2(KERNEL, 0) / 4**0.5),
    (dict(norm="row", normalized=False), KERNEL / L2(KERNEL, 0)),
    (dict(norm="rms"), KERNEL / L2(KERNEL, (0, 1)) * 24**0.5),
    (dict(norm="sign", scale=3.0), 3 * np.sign(KERNEL) / 4),
  ],
)
def test_the_point_of_each_ball(hyper, expected):
  np.testing.assert_allclose(
    direction({"w": jnp.asarray(KERNEL)}, **hyper)["w"], expected, rtol=1e-5
  )


@pytest.mark.parametrize(
  "hyper, shape, factor",
  [
    (dict(), (4, 6), (6 / 4) ** 0.5),
    (dict(), (6, 4), (4 / 6) ** 0.5),
    (dict(normalized=False), (6, 4), 4**0.5),
    (dict(clamp=True), (4, 6), (6 / 4) ** 0.5),
    (dict(clamp=True), (6, 4), 1),
  ],
)
def test_the_spectral_factor(hyper, shape, factor):
  """Five quintic steps leave singular values between about 0.7 and 1.2."""
  for norm in ("spectral", "auto"):
    lengths = np.linalg.svd(
      direction({"w": jnp.asarray(KERNEL.reshape(shape))}, norm=norm, **hyper)["w"],
      compute_uv=False,
    )
    assert lengths.min() > 0.6 * factor and lengths.max() < 1.3 * factor


def test_vectors_and_scalars_take_the_rms_norm_by_default():
  gradients = {
    "w": jnp.asarray(KERNEL),
    "gain": jnp.asarray(KERNEL[:2]),
    "scale": jnp.float32(-0.3),
  }
  axes = {"w": Axes((), (0,), (1,)), "gain": Axes((0,), (), (1,)), "scale": Axes()}
  ours = direction(gradients, axes)
  np.testing.assert_allclose(
    ours["gain"], KERNEL[:2] / L2(KERNEL[:2], 1) * 6**0.5, rtol=1e-5
  )  # of each slice
  np.testing.assert_allclose(ours["scale"], -1, rtol=1e-6)
  for norm in ("col", "rms"):  # a vector is a matrix of one column
    np.testing.assert_array_equal(direction(gradients, axes, norm=norm)["gain"], ours["gain"])
  for norm in ("sign", "row"):
    np.testing.assert_allclose(
      direction(gradients, axes, norm=norm)["gain"], np.sign(KERNEL[:2]), rtol=1e-5
    )


ALL = ("auto", "spectral", "sign", "col", "row", "rms")


@pytest.mark.parametrize("norm", ALL)
def test_a_stacked_leaf_updates_as_its_slices_do_and_orientation_comes_from_the_axes(norm):
  stacked = noise({"w": jnp.zeros((3, 4, 6))}, 1)["w"]
  ours = direction({"w": stacked}, norm=norm)["w"]
  flipped = direction({"w": stacked.transpose(2, 0, 1)}, {"w": Axes((1,), (2,), (0,))}, norm=norm)[
    "w"
  ]
  np.testing.assert_allclose(ours, flipped.transpose(1, 2, 0), rtol=0, atol=1e-6)
  for i in range(3):
    np.testing.assert_allclose(
      ours[i], direction({"w": stacked[i]}, norm=norm)["w"], rtol=0, atol=1e-6
    )


TREE_AXES = {
  "layers": {"kernel": Axes((0,), (1,), (2,)), "gain": Axes((0,), (), (1,))},
  "row": Axes((), (0,), (1,)),
  "embedding": Axes((), (1,), (0,)),
  "scale": Axes(),
}


def tree(dtype=jnp.float32):
  def zeros(*shape):
    return jnp.zeros(shape, dtype)

  return noise(
    {
      "layers": {"kernel": zeros(3, 4, 6), "gain": zeros(3, 4)},
      "row": zeros(1, 5),
      "embedding": zeros(16, 8),
      "scale": zeros(),
    },
    0,
  )


def steps(tx, params, count=3, seed=1):
  """Updates of the last of some steps, and the state."""
  state, update = tx.init(params), jax.jit(tx.update)
  for number in range(count):
    updates, state = update(noise(params, seed + number), state, params)
  return updates, state


@pytest.mark.parametrize("norm", ["auto", "row"])
def test_eight_devices_update_as_one_does(norm):
  mesh, params, hyper = (
    make_mesh(config.Mesh(2, 2, 2)),
    tree(),
    dict(axes=TREE_AXES, momentum=0.9, norm=norm, ns_dtype="float32"),
  )

  def split(*names):
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

  shardings = {
    "layers": {"kernel": split(None, "fsdp", "model"), "gain": split()},
    "row": split(),
    "scale": split(),
    "embedding": split("model", "fsdp"),
  }
  one, _ = steps(scion(0.1, **hyper), params)
  eight, state = steps(scion(0.1, mesh=mesh, **hyper), jax.device_put(params, shardings))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), eight, one)
  stacks = [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if "blocks" in jax.tree_util.keystr(path)
  ]
  assert [x.shape[0] for x in stacks] == (
    [8, 8, 8] if norm == "auto" else []
  )  # one share per device; others need no blocks


@pytest.mark.parametrize("norm", ["auto", "sign", "col", "row", "rms"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_gradients_move_nothing_and_dtypes_stay(norm, dtype):
  params, tx = tree(dtype), scion(0.1, axes=TREE_AXES, norm=norm, momentum=0.9, constrained=False)
  state = tx.init(params)
  updates, after = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
  jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, np.zeros(p.shape)), updates, params)
  assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}


@pytest.mark.parametrize("norm", ["auto", "row"])
def test_masked_leaves_are_passed_over(norm):
  params, hyper = tree()["layers"], dict(norm=norm, ns_dtype="float32", momentum=0.5)
  masked = {"kernel": params["kernel"], "gain": optax.MaskedNode()}
  tx = scion(0.1, axes=TREE_AXES["layers"], **hyper)
  updates, _ = tx.update(masked, tx.init(masked), masked)
  assert jax.tree.structure(updates) == jax.tree.structure(masked)
  alone = scion(0.1, **hyper)
  expected, _ = alone.update(
    {"w": params["kernel"]}, alone.init({"w": params["kernel"]}), {"w": params["kernel"]}
  )
  np.testing.assert_array_equal(updates["kernel"], expected["w"])


@pytest.mark.parametrize("norm", ["auto", "sign"])
def test_without_momentum_nothing_is_kept(norm):
  """The official default."""
  tx, params = scale_by_scion(axes=TREE_AXES, norm=norm, ns_dtype=None), tree()
  last, state = steps(tx, params, count=3, seed=1)
  assert all(x.shape == () and x.dtype == jnp.int32 for x in jax.tree.leaves(state))
  jax.tree.map(np.testing.assert_array_equal, last, steps(tx, params, count=1, seed=3)[0])


@pytest.mark.parametrize(
  "hyper, decay",
  [
    (dict(), 1.0),
    (dict(constrained=False), 0.0),
    (dict(constrained=False, weight_decay=0.5), 0.5),
    (dict(weight_decay=0.5), 1.5),
  ],
)
def test_constrained_weights_decay_at_the_learning_rate(hyper, decay):
  params, tx = tree(), scion(0.1, axes=TREE_AXES, **hyper)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  jax.tree.map(
    lambda u, p: np.testing.assert_allclose(u, -0.1 * decay * p, rtol=1e-6), updates, params
  )


def test_constrained_weights_stay_in_the_ball():
  params, tx = {"w": jnp.zeros((4, 6))}, scion(0.3, norm="sign", scale=2.0, momentum=0.9)
  state = tx.init(params)
  for number in range(20):
    updates, state = tx.update(noise(params, number), state, params)
    params = optax.apply_updates(params, updates)
  assert abs(params["w"]).max() <= 2.0 / 4 + 1e-6


@pytest.mark.parametrize("norm", ["auto", "sign", "col", "row", "rms"])
def test_initial_matrices_lie_on_the_ball(norm):
  params = tree()
  drawn = initialize(jax.random.key(0), params, TREE_AXES, norm=norm, scale=2.0)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
    lambda x: (x.shape, x.dtype), params
  )
  if norm == "auto":
    lengths = np.linalg.svd(drawn["embedding"], compute_uv=False)
    np.testing.assert_allclose(lengths, 2.0 * (16 / 8) ** 0.5, rtol=1e-5)
  else:  # on the ball, and so the furthest point along itself
    furthest = direction(drawn, TREE_AXES, norm=norm, scale=2.0)
    np.testing.assert_allclose(drawn["embedding"], furthest["embedding"], rtol=1e-5)
  assert not np.allclose(drawn["layers"]["kernel"][0], drawn["layers"]["kernel"][1])
  np.testing.assert_array_equal(drawn["layers"]["gain"], params["layers"]["gain"])


def test_floats_may_be_injected():
  params, hyper = (
    tree(),
    dict(axes=TREE_AXES, momentum=0.9, scale=3.0, ns_dtype="float32", weight_decay=0.1),
  )
  injected = optax.inject_hyperparams(scion)(learning_rate=lambda count: 0.1 / (1 + count), **hyper)
  fixed = scion(lambda count: 0.1 / (1 + count), **hyper)
  ours, expected = (steps(tx, params)[0] for tx in (injected, fixed))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours, expected)


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(norm="spectre"), "norm = 'spectre': did you mean 'spectral'"),
    (dict(norm="sign", clamp=True), "clamp = True"),
    (dict(momentum=1.0), "momentum = 1.0"),
    (dict(norm="sign", momentum=-0.1), "momentum = -0.1"),
    (dict(ns_dtype="half"), "half"),
  ],
)
def test_what_cannot_be_is_refused_when_built(hyper, message):
  with pytest.raises(ValueError, match=message):
    scion(0.1, **hyper)


def test_the_spectral_norm_is_of_matrices_alone():
  with pytest.raises(ValueError, match="'gain' of shape"):
    scion(0.1, norm="spectral").init({"gain": jnp.ones(3)})
