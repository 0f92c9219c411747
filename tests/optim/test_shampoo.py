"""Shampoo against Meta's and Google's, thirty steps on fixed gradients; its switches against a few
lines of numpy.

tests/golden/shampoo_meta-head_*.npz: DistributedShampoo of facebookresearch/optimizers (f606606),
in float64; its counter of steps, a float32 tensor, rounds the learning rate and the bias
corrections, which is worth 6e-8 of parameters. shampoo_google_*.npz: distributed_shampoo of
google-research/precondition (239a8cd), in float32: its first roots, of factors of low rank, amplify
rounding to up to 5e-4 of matrices, and more of vectors. Before these roots are used, there is no
such noise. Matrices are [fan-out, fan-in] there. Snapshots in float32 are exact to 6e-8.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beyond_outliers import config, optim
from beyond_outliers.mesh import make_mesh
from beyond_outliers.optim.shampoo import scale_by_shampoo, shampoo
from beyond_outliers.params import Axes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KEYS = ("w1", "w2", "b", "emb")
MATRIX = Axes(fan_in=(1,), fan_out=(0,))
AXES = {"w1": MATRIX, "w2": MATRIX, "emb": MATRIX, "b": Axes(fan_out=(0,))}

DECAYS = dict(b1=0.9, b2=0.95, grafting_b2=0.95, weight_decay=0.1)
OFTEN = dict(grafting="adam", precondition_frequency=5, block_size=64, eps=1e-4)
META = {
  f"{graft}-graft_freq{frequency}_dim{size}_eps0.0001": dict(
    grafting=graft, precondition_frequency=frequency, block_size=size, eps=1e-4
  )
  for graft in ("adam", "none")
  for frequency in (1, 5)
  for size in (16, 64)
} | {
  "adam-graft_freq5_dim64_eps1e-10": OFTEN | dict(eps=1e-10),
  "adam-graft_freq5_dim64_eps0.0001_exp0.5": OFTEN | dict(exponent=0.5),
  "adam-graft_freq5_dim64_eps0.0001_newton": OFTEN | dict(root="newton"),
  "adam-graft_freq5_dim8192_eps0.0001": OFTEN | dict(block_size=8192, merge_dims=True),
}
# How far the official code's own float32 run is from its float64 one after 30 steps.
FLOAT32_DEVIATION = {
  "none-graft_freq1_dim64_eps0.0001": {
    "b": 8.94e-07,
    "emb": 2.01e-07,
    "w1": 8.11e-08,
    "w2": 2.41e-07,
  },
  "adam-graft_freq5_dim16_eps0.0001": {
    "b": 5.56e-06,
    "emb": 9.57e-07,
    "w1": 1.27e-07,
    "w2": 1.43e-07,
  },
}
# By file: settings, tolerances of matrices and of the vector, and the last step before roots are
# used.
LATER = dict(precondition_frequency=5, start_step=6)
GOOGLE = {
  "rmsprop_freq1_bs16": (dict(block_size=16, start_step=2), 2e-5, 2e-5, 1),
  "rmsprop_freq1_bs64": (dict(block_size=64, start_step=2), 5e-6, 1e-4, 1),
  "rmsprop_freq5_bs16": (dict(block_size=16, **LATER), 3e-4, 3e-4, 5),
  "rmsprop_freq5_bs64": (dict(block_size=64, **LATER), 1e-3, 1e-3, 5),
  "rmsprop_freq5_bs64_eigh": (dict(block_size=64, root="eigh", **LATER), 1e-3, 2e-3, 5),
  "none_freq5_bs64": (dict(block_size=64, grafting="none", **LATER), 1e-3, 5e-2, 5),
}


def trajectory(tx, dtype, keys=KEYS):
  """{step: parameters}, float64 numpy."""
  problem = np.load(GOLDEN / "problem.npz")
  params = {key: jnp.asarray(problem[f"p0_{key}"], dtype) for key in keys}
  gradients = {key: jnp.asarray(problem[f"g_{key}"], dtype) for key in keys}

  def step(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  _, after = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, gradients)
  return {
    number: {key: np.asarray(after[key][number - 1], np.float64) for key in keys}
    for number in (1, 2, 5, 10, 11, 20, 30)
  }


@pytest.mark.parametrize("name", META)
def test_the_trajectory_is_metas(name):
  golden = np.load(GOLDEN / f"shampoo_meta-head_{name}_f64.npz")
  keys = (
    ("w1", "b") if "dim8192" in name else KEYS
  )  # one factor for the whole of a leaf: the small ones will do
  with jax.enable_x64(True):
    ours = trajectory(shampoo(0.01, axes=AXES, **DECAYS, **META[name]), jnp.float64, keys)
  for number, params in ours.items():
    for key, value in params.items():
      tolerance = 1e-8 if number == 1 else 1e-7
      np.testing.assert_allclose(
        value,
        golden[f"s{number:02d}_{key}"],
        rtol=0,
        atol=tolerance,
        err_msg=f"step {number}, {key}",
      )


@pytest.mark.parametrize("name", FLOAT32_DEVIATION)
def test_float32_stays_as_close_as_metas_does(name):
  golden = np.load(GOLDEN / f"shampoo_meta-head_{name}_f64.npz")
  ours = trajectory(shampoo(0.01, axes=AXES, **DECAYS, **META[name]), jnp.float32)[30]
  for key, deviation in FLOAT32_DEVIATION[name].items():
    np.testing.assert_allclose(
      ours[key], golden[f"s30_{key}"], rtol=0, atol=2 * deviation, err_msg=key
    )


@pytest.mark.parametrize("name", GOOGLE)
def test_the_trajectory_is_googles(name):
  golden = np.load(GOLDEN / f"shampoo_google_{name}_f32.npz")
  hyper, of_matrices, of_vector, warm_up = GOOGLE[name]
  hyper = dict(grafting="rmsprop", root="newton") | hyper
  tx = shampoo(
    0.01,
    axes=AXES,
    eps=1e-6,
    eps_mode="relative",
    bias_correction=False,
    graft_granularity="parameter",
    momentum="update",
    refresh="together_from_first",
    **DECAYS,
    **hyper,
  )
  with jax.enable_x64(True):
    ours = trajectory(tx, jnp.float64)
  for number, params in ours.items():
    for key, value in params.items():
      tolerance = 1.5e-7 if number <= warm_up else of_vector if key == "b" else of_matrices
      np.testing.assert_allclose(
        value,
        golden[f"s{number:02d}_{key}"],
        rtol=0,
        atol=tolerance,
        err_msg=f"step {number}, {key}",
      )


def follow(tx, gradients, state=None):
  """Updates and states of every step; gradients: of every step, stacked."""

  def step(state, gradient):
    updates, state = tx.update(gradient, state)
    return state, (updates, state)

  state = tx.init(jax.tree.map(lambda g: g[0], gradients)) if state is None else state
  return jax.lax.scan(step, state, gradients)[1]


def run(gradients, **hyper):
  """The same of a program of its own, in numpy."""
  return jax.device_get(jax.jit(functools.partial(follow, scale_by_shampoo(**hyper)))(gradients))


def noise(shapes, steps, seed=0, dtype=np.float32):
  """Gradients of every step, stacked; each leaf's own, whatever else there is."""
  return {
    key: np.random.default_rng([seed, *key.encode()]).standard_normal((steps, *shape)).astype(dtype)
    for key, shape in shapes.items()
  }


def adams(g_TxN, b1=0.9, b2=0.999, eps=1e-10):
  """Adam's direction at every step."""
  m = v = 0
  for t, g in enumerate(np.asarray(g_TxN, np.float64), 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def by_hand(
  gradients, *, b1=0.9, b2=1.0, eps=1e-4, exponent=None, axes=None, grafting="none", corrected=True
):
  """Meta's algorithm for one block, with new roots at every step: what is to be subtracted."""
  momentum, second, factors = (
    0,
    0,
    {axis: 0 for axis in range(gradients[0].ndim) if axes is None or axis in axes},
  )
  for t, g in enumerate(gradients, 1):
    momentum, second = b1 * momentum + (1 - b1) * g, 0.999 * second + 0.001 * g * g
    fed = momentum / (1 - b1**t) if corrected else momentum
    p = fed
    for axis in factors:
      rest = [other for other in range(g.ndim) if other != axis]
      factors[axis] = b2 * factors[axis] + (1 - b2 if b2 < 1 else 1) * np.tensordot(
        g, g, (rest, rest)
      )
      values, vectors = np.linalg.eigh(factors[axis] / (1 - b2**t if b2 < 1 and corrected else 1))
      root = (
        vectors * (values - min(values.min(), 0) + eps) ** -(exponent or 1 / (2 * g.ndim))
      ) @ vectors.T
      p = np.moveaxis(np.tensordot(root, p, (1, axis)), 0, axis)
    step = {
      "none": p,
      "sgd": fed,
      "rmsprop": fed / (np.sqrt(second) + 1e-10),
      "adam": fed / (np.sqrt(second / (1 - 0.999**t if corrected else 1)) + 1e-10),
    }[grafting]
    yield p * np.linalg.norm(step) / (np.linalg.norm(p) + 1e-16)


@pytest.mark.parametrize(
  "hyper, shapes",
  [
    (dict(), {"m": (5, 7), "v": (6,)}),
    (dict(), {"row": (1, 4), "scalar": ()}),
    (dict(grafting="sgd", exponent=0.3, b2=0.9), {"m": (5, 7), "v": (6,)}),
    (dict(grafting="rmsprop", b2=0.9), {"m": (7, 5), "scalar": ()}),
    (dict(grafting="rmsprop", b2=0.9, bias_correction=False), {"m": (5, 7)}),
    (dict(grafting="adam", b2=0.9, long_axes="skip", block_size=6), {"m": (5, 7), "tall": (9, 4)}),
  ],
)
def test_a_step_is_the_formula(hyper, shapes):
  gradients = noise(shapes, 4, dtype=np.float64)
  with jax.enable_x64(True):
    updates, states = run(gradients, eps=1e-4, **hyper)
  for key, g in gradients.items():
    known = {name: value for name, value in hyper.items() if name in ("grafting", "exponent", "b2")}
    axes = [axis for axis in range(g.ndim - 1) if g.shape[1 + axis] <= hyper.get("block_size", 99)]
    expected = by_hand(
      g.reshape(4, 1) if g.ndim == 1 else g,
      axes=axes if g.ndim > 1 else None,
      corrected=hyper.get("bias_correction", True),
      **known,
    )
    np.testing.assert_allclose(
      updates[key], [x.reshape(g.shape[1:]) for x in expected], rtol=0, atol=1e-11, err_msg=key
    )
  if "long_axes" in hyper:
    assert [x.shape for x in states.blocks["5x7"].factors] == [(4, 1, 5, 5)], (
      "none for the axis of 7"
    )


def test_what_has_no_factor_takes_the_grafting_step():
  """Without it an axis longer than block_size has none: a long vector has no other."""
  g = noise({"v": (7,)}, 3)
  updates, state = run(g, grafting="adam", long_axes="skip", block_size=6)
  np.testing.assert_allclose(updates["v"], np.stack(list(adams(g["v"]))), rtol=1e-5)
  assert state.blocks["7"].factors == () and jax.tree.leaves(state.blocks["7"].roots) == []


FAMILY = {
  "stack": (2, 12, 10),
  "one": (12, 10),
  "two": (12, 10),
  "turned": (10, 12),
  "heads": (12, 5, 2),
  "gains": (2, 5),
  "gain": (5,),
  "last": (5,),
}
FAMILY_AXES = {
  "stack": Axes((0,), (1,), (2,)),
  "one": Axes((), (0,), (1,)),
  "two": Axes((), (0,), (1,)),
  "turned": MATRIX,
  "heads": Axes((), (0,), (1, 2)),
  "gains": Axes((0,), (), (1,)),
  "gain": Axes(fan_out=(0,)),
  "last": Axes(fan_out=(0,)),
}


@pytest.fixture(scope="module", params=["block", "parameter"])
def family(request):
  """Updates of leaves that hold the same numbers, each in its own way, in blocks of at most 8; and
  the granularity."""
  gradients = noise({"stack": (2, 12, 10), "gains": (2, 5)}, 5)
  stack, gains = gradients["stack"], gradients["gains"]
  gradients |= {
    "one": stack[:, 0],
    "two": stack[:, 1],
    "turned": stack[:, 0].swapaxes(1, 2),
    "heads": stack[:, 0].reshape(5, *FAMILY["heads"]),
    "gain": gains[:, 0],
    "last": gains[:, 1],
  }
  gradients = {"masked": optax.MaskedNode(), **gradients}
  updates, _ = run(
    gradients,
    axes=FAMILY_AXES,
    block_size=8,
    eps=0.01,
    b2=0.95,
    grafting="adam",
    precondition_frequency=2,
    graft_granularity=request.param,
  )
  assert jax.tree.structure(updates) == jax.tree.structure(gradients)
  return updates, gradients, request.param


def test_a_stacked_leaf_updates_as_its_slices_do(family):
  updates, _, _ = family
  for i, (matrix, vector) in enumerate([("one", "gain"), ("two", "last")]):
    np.testing.assert_allclose(updates["stack"][:, i], updates[matrix], rtol=0, atol=1e-6)
    np.testing.assert_allclose(updates["gains"][:, i], updates[vector], rtol=0, atol=1e-6)


def test_what_a_matrix_is_comes_from_the_axes(family):
  """Not how it lies in memory: transposed, or with its columns in heads."""
  updates, _, _ = family
  np.testing.assert_allclose(updates["turned"].swapaxes(1, 2), updates["one"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(updates["heads"].reshape(5, 12, 10), updates["one"], rtol=0, atol=1e-6)


def test_the_length_is_grafted_block_by_block_or_onto_the_whole(family):
  updates, gradients, granularity = family

  def length(x):
    return np.linalg.norm(x, axis=(1, 2))

  expected, ours = np.stack(list(adams(gradients["one"]))), updates["one"]
  np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)  # no roots yet
  np.testing.assert_allclose(length(ours), length(expected), rtol=1e-5)
  corners = [
    (slice(None), rows, columns)
    for rows in (slice(8), slice(8, 12))
    for columns in (slice(8), slice(8, 10))
  ]
  agree = [
    np.allclose(length(ours[corner])[1:], length(expected[corner])[1:], rtol=1e-3)
    for corner in corners
  ]
  assert agree == 4 * [granularity == "block"]
  assert (np.abs(ours[1:] - expected[1:]).max((1, 2)) > 0.1).all(), "but the direction is another"


def test_small_matrices_may_be_vectors():
  """merge_dims: those of at most block_size numbers, in the order in which they lie."""
  gradients = noise({"m": (4, 5), "large": (5, 5)}, 3)
  updates, state = run(
    {**gradients, "v": gradients["m"].reshape(3, 20)}, block_size=20, merge_dims=True, eps=1e-4
  )
  np.testing.assert_allclose(updates["m"].reshape(3, 20), updates["v"], rtol=0, atol=1e-6)
  assert {name: len(bucket.factors) for name, bucket in state.blocks.items()} == {"20": 1, "5x5": 2}
  _, state = run(gradients, block_size=20, merge_dims=True, long_axes="skip", eps=1e-4)
  assert set(state.blocks) == {"20", "5x5"}


def test_bfloat16_leaves_lose_only_what_they_cannot_hold():
  gradients = jax.tree.map(
    lambda g: jnp.asarray(g, jnp.bfloat16), noise({"half": (4, 6), "scale": ()}, 3)
  )
  updates, state = run(
    {**gradients, "whole": gradients["half"].astype(jnp.float32)}, eps=1e-4, grafting="adam"
  )
  assert {key: x.dtype for key, x in updates.items()} == {
    "half": jnp.bfloat16,
    "scale": jnp.bfloat16,
    "whole": jnp.float32,
  }
  np.testing.assert_array_equal(updates["half"], updates["whole"].astype(jnp.bfloat16))
  assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.parametrize(
  "hyper",
  [
    dict(grafting="adam"),
    dict(
      eps_mode="relative",
      eps=1e-6,
      root="newton",
      grafting="rmsprop",
      momentum="update",
      graft_granularity="parameter",
      refresh="together_from_first",
    ),
  ],
)
def test_a_leaf_that_never_has_a_gradient_stays(hyper):
  shapes = {"m": (3, 4), "row": (1, 4), "s": ()}
  updates, state = run(
    {key: g.at[:4].set(0) for key, g in jax.tree.map(jnp.asarray, noise(shapes, 5)).items()},
    precondition_frequency=2,
    b2=0.95,
    **hyper,
  )
  for key, x in updates.items():
    assert not x[:4].any() and np.isfinite(x).all() and x[4].all(), key
  for x in jax.tree.leaves(state):
    assert np.isfinite(x).all()
  assert not any(bucket.roots.kept.any() for bucket in state.blocks.values())


@functools.cache
def refusing():
  """Three blocks, roots every other step: gradients; and (state, largest residual) -> updates and
  states of every step."""
  gradients = noise({"w": (3, 4, 6)}, 6)

  def make(max_residual):
    return scale_by_shampoo(
      b2=0.95, eps=1e-4, grafting="adam", precondition_frequency=2, max_residual=max_residual
    )

  start = make(0.1).init({"w": jnp.zeros((3, 4, 6))})
  program = jax.jit(lambda state, max_residual: follow(make(max_residual), gradients, state))
  return gradients["w"], start, lambda state, limit: jax.device_get(program(state, limit))


def test_a_root_says_how_old_and_how_good_it_is():
  g, start, program = refusing()
  _, states = program(start, 0.1)
  roots = states.blocks["4x6"].roots
  np.testing.assert_array_equal(
    roots.age, np.broadcast_to(np.array([-1, 0, 1, 0, 1, 0])[:, None, None], (6, 3, 2))
  )
  assert not roots.kept.any() and roots.residual.max() < 1e-4 and (roots.residual[1:] > 0).all()
  np.testing.assert_array_equal(roots.values[0][0], np.broadcast_to(np.eye(4), (3, 4, 4)))
  decays = 0.05 * 0.95 ** np.arange(5, -1, -1.0)
  for axis, products in enumerate(("tbmn,tbkn->tbmk", "tbnm,tbnk->tbmk")):
    factor = np.tensordot(decays / decays.sum(), np.einsum(products, g, g), (0, 0)) + 1e-4 * np.eye(
      4 + 2 * axis
    )
    estimate = roots.condition[5, :, axis] / np.linalg.cond(factor)
    assert (estimate > 0.75).all() and (estimate < 1.001).all()
    power = np.linalg.matrix_power(roots.values[axis][5].astype(np.float64), 4)
    np.testing.assert_allclose(
      power @ factor, np.broadcast_to(np.eye(4 + 2 * axis), factor.shape), atol=1e-3
    )


def test_refused_roots_are_never_used():
  g, start, program = refusing()
  updates, states = program(start, -1.0)
  roots = states.blocks["4x6"].roots
  assert (roots.age == -1).all() and np.isfinite(roots.residual).all()
  np.testing.assert_array_equal(
    roots.kept, np.broadcast_to(np.array([0, 1, 1, 2, 2, 3])[:, None, None], (6, 3, 2))
  )
  np.testing.assert_array_equal(roots.values[1], np.broadcast_to(np.eye(6), (6, 3, 6, 6)))
  np.testing.assert_allclose(updates["w"], np.stack(list(adams(g))), rtol=1e-4)


def test_a_broken_factor_stops_no_other():
  """One axis of one block keeps the root that it has; its other axis and the other blocks know
  nothing of it."""
  _, start, program = refusing()
  expected, clean = program(start, 0.1)
  last = jax.tree.map(lambda x: jnp.asarray(x[-1]), clean)
  bucket = last.blocks["4x6"]
  broken = last._replace(
    blocks={
      "4x6": bucket._replace(factors=(bucket.factors[0].at[1].set(jnp.nan), bucket.factors[1]))
    }
  )
  expected, clean = program(last, 0.1)
  updates, states = program(broken, 0.1)
  sound, roots = clean.blocks["4x6"].roots, states.blocks["4x6"].roots
  np.testing.assert_array_equal(roots.kept[:, 1, 0], [0, 1, 1, 2, 2, 3])
  np.testing.assert_array_equal(roots.age[:, 1, 0], [1, 2, 3, 4, 5, 6])
  assert not np.isfinite(roots.residual[1:, 1, 0]).any()
  np.testing.assert_array_equal(
    roots.values[0][:, 1], np.broadcast_to(bucket.roots.values[0][1], (6, 4, 4))
  )
  assert np.isfinite(updates["w"]).all()
  for which in np.ndindex(3, 2):
    if which != (1, 0):
      block, axis = which
      for name in ("kept", "age", "residual"):
        np.testing.assert_array_equal(
          getattr(roots, name)[:, block, axis], getattr(sound, name)[:, block, axis], err_msg=name
        )
      np.testing.assert_array_equal(roots.values[axis][:, block], sound.values[axis][:, block])
  np.testing.assert_array_equal(np.delete(updates["w"], 1, 1), np.delete(expected["w"], 1, 1))
  np.testing.assert_array_equal(updates["w"][0], expected["w"][0])  # its root is still the same


@pytest.mark.parametrize(
  "hyper, ages",
  [
    (dict(), [0, 0, 0, 0, 0, 0, 0]),
    (dict(precondition_frequency=3), [-1, -1, 0, 1, 2, 0, 1]),
    (dict(precondition_frequency=3, start_step=4), [-1, -1, -1, 0, 1, 0, 1]),
    (dict(precondition_frequency=3, start_step=2), [-1, 0, 0, 1, 2, 0, 1]),
    (dict(precondition_frequency=3, refresh="together_from_first"), [0, 1, 2, 0, 1, 2, 0]),
    (dict(precondition_frequency=3, refresh="staggered"), [-1, -1, 0, 1, 2, 0, 1]),
  ],
)
def test_when_roots_are_renewed_and_used(hyper, ages):
  g = noise({"v": (3,)}, 7)
  updates, state = run(g, grafting="adam", b2=0.95, **hyper)
  assert state.blocks["3"].roots.age[:, 0, 0].tolist() == ages
  start = hyper.get("start_step", hyper.get("precondition_frequency", 1))
  ours_alone = [
    np.allclose(u, a, rtol=1e-4) for u, a in zip(updates["v"], adams(g["v"]), strict=True)
  ]
  assert ours_alone == [t < start for t in range(1, 8)], "Adam's own steps before start_step"


def test_staggered_every_block_has_its_own_step():
  """Seven and two blocks, three steps: three roots a step, from step 4 on, as they would be if all
  were computed then."""
  gradients = noise({"w": (7, 4, 6), "v": (2, 5)}, 12)
  hyper = dict(
    axes={"w": Axes((0,), (1,), (2,)), "v": Axes((0,), (), (1,))},
    b2=0.95,
    eps=1e-4,
    grafting="adam",
  )
  updates, states = run(
    gradients, refresh="staggered", precondition_frequency=3, start_step=4, **hyper
  )
  every, always = run(gradients, refresh="staggered", **hyper)
  together, _ = run(gradients, **hyper)
  jax.tree.map(np.testing.assert_array_equal, every, together)
  hits = {
    name: (bucket.roots.age == 0).all(2) for name, bucket in states.blocks.items()
  }  # [steps, blocks]
  for t in range(12):
    assert sum(hit[t].sum() for hit in hits.values()) == (3 if t >= 3 else 0)
  for hit in hits.values():
    for t in range(3, 10):
      np.testing.assert_array_equal(hit[t : t + 3].sum(0), 1)
  for name, bucket in states.blocks.items():
    for value, reference in zip(bucket.roots.values, always.blocks[name].roots.values, strict=True):
      np.testing.assert_allclose(value[hits[name]], reference[hits[name]], rtol=1e-4, atol=1e-4)
  unready = ~np.maximum.accumulate(hits["4x6"])
  assert unready[3:5].any(1).all() and not unready[5:].any()
  expected = np.stack(list(adams(gradients["w"])))
  agree = np.abs(updates["w"] - expected).max((2, 3)) < 1e-4
  np.testing.assert_array_equal(agree, unready)


@pytest.mark.parametrize("momentum", ["gradient", "update"])
def test_a_block_without_root_takes_its_grafting_step_whatever_the_others_of_its_parameter_do(
  momentum,
):
  """Three blocks of one matrix get their first roots one after the other."""
  g = noise({"w": (12, 4)}, 7)
  updates, states = run(
    g,
    block_size=4,
    b2=0.95,
    eps=1e-4,
    grafting="adam",
    graft_granularity="parameter",
    momentum=momentum,
    refresh="staggered",
    precondition_frequency=3,
    start_step=3,
  )
  steps = np.stack(list(adams(g["w"], b1=0.9 if momentum == "gradient" else 0.0)))
  averages = [
    0.1 * np.tensordot(0.9 ** np.arange(t, -1, -1.0), steps[: t + 1], (0, 0)) for t in range(7)
  ]
  expected = (steps if momentum == "gradient" else np.stack(averages)).reshape(7, 3, 4, 4)
  without = (states.blocks["4x4"].roots.age < 0).any(2)
  assert without.sum(1).tolist() == [3, 3, 2, 1, 0, 0, 0]
  np.testing.assert_allclose(
    updates["w"].reshape(7, 3, 4, 4)[without], expected[without], rtol=1e-4, atol=1e-6
  )


def test_packed_roots_and_factors_are_the_same_numbers():
  """And in bfloat16 nearly so, where factors have full rank."""
  gradients = noise({"m": (5, 6)}, 12)
  hyper = dict(b2=0.95, eps=1e-4, grafting="adam", precondition_frequency=2, start_step=6)
  kinds = [
    dict(preconditioner_dtype=dtype, packed=packed)
    for dtype in ("float32", "bfloat16")
    for packed in (False, True)
  ]
  plain, *others = (run(gradients, **hyper, **kind)[0] for kind in kinds)
  for key, expected in plain.items():
    np.testing.assert_array_equal(others[0][key], expected)
    np.testing.assert_array_equal(others[2][key], others[1][key])
    for t in range(5, 12):
      assert (
        1e-5 < np.linalg.norm(others[1][key][t] - expected[t]) / np.linalg.norm(expected[t]) < 0.02
      )


@pytest.mark.parametrize(
  "hyper, momenta, share",
  [
    (dict(), 1, 1),
    (dict(grafting="sgd", packed=True), 1, 1 / 2),
    (dict(grafting="adam", preconditioner_dtype="bfloat16", b2=0.95), 2, 1 / 2),
    (dict(grafting="rmsprop", momentum="update"), 3, 1),
    (dict(grafting="adam", preconditioner_dtype="bfloat16", b2=0.95, packed=True), 2, 1 / 4),
    (dict(long_axes="skip", block_size=64), 1, 0),
  ],
)
def test_the_state_is_as_small_as_it_says(hyper, momenta, share):
  """Bytes: 4 for each momentum or second moment, 8 (m² + n²) / mn for factors and roots."""
  m, n = 96, 160
  state = jax.eval_shape(scale_by_shampoo(**hyper).init, {"w": jnp.zeros((m, n))})
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert size == pytest.approx(4 * momenta * m * n + 8 * share * (m * m + n * n), rel=0.01)


FROZEN, NOISE, STEPS = 4, 0.3, 500


def regression(inputs=48, outputs=8, batch=32):
  """Rates -> final loss, and the state: a linear layer with gains on its inputs, some of which are
  always zero.

  Fewer gradients have been seen than a gain has numbers when its first root is computed, and it has
  another scale."""
  draw = np.random.default_rng(0)
  spread = np.logspace(0, -1.5, inputs).astype(np.float32)
  spread[-FROZEN:] = 0
  target = jnp.asarray(
    draw.standard_normal((inputs, outputs)) * (1 + 0.5 * draw.standard_normal((inputs, 1))),
    jnp.float32,
  )

  def loss(p, x, y):
    return jnp.mean(((x * p["gain"]) @ p["kernel"] + p["bias"] - y) ** 2)

  def train(tx):
    def step(carry, key):
      params, state = carry
      x, e = (
        jax.random.normal(k, (batch, size))
        for k, size in zip(jax.random.split(key), (inputs, outputs), strict=True)
      )
      value, gradient = jax.value_and_grad(loss)(
        params, x * spread, x * spread @ target + NOISE * e
      )
      updates, state = tx.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), value

    params = {
      "kernel": jnp.zeros((inputs, outputs)),
      "gain": jnp.ones(inputs),
      "bias": jnp.zeros(outputs),
    }
    (params, state), losses = jax.lax.scan(
      step, (params, tx.init(params)), jax.random.split(jax.random.key(0), STEPS)
    )
    excess = (
      jnp.sum((spread[:, None] * (params["gain"][:, None] * params["kernel"] - target)) ** 2)
      / outputs
    )
    return excess + jnp.mean(params["bias"] ** 2) + NOISE**2, losses[0], params, state

  return train


@pytest.mark.parametrize("hyper", [dict(), dict(refresh="staggered"), dict(root="newton")])
def test_the_studys_eps_does_no_harm(hyper):
  """1e-10, far below what float32 leaves of a zero eigenvalue: grafting bounds what the noise can
  do."""
  rate = optax.cosine_decay_schedule(0.03, STEPS)
  train = jax.jit(
    lambda eps: regression()(
      shampoo(
        rate,
        b1=0.95,
        b2=0.95,
        eps=eps,
        grafting="adam",
        grafting_b2=0.95,
        precondition_frequency=20,
        **hyper,
      )
    )
  )
  loss, first, params, state = jax.device_get(train(1e-10))
  other, *_ = jax.device_get(train(1e-6))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
  assert loss < 1.05 * NOISE**2 < 0.02 * first and loss == pytest.approx(other, rel=0.02)
  assert {name: int(bucket.roots.kept.sum()) for name, bucket in state[0].blocks.items()} == {
    "8": 0,
    "48": 0,
    "8x48": 0,
  }
  np.testing.assert_allclose(params["kernel"][-FROZEN:], 0, atol=1e-3)


@pytest.mark.parametrize(
  "hyper",
  [
    dict(
      grafting="adam", precondition_frequency=2, refresh="staggered", graft_granularity="parameter"
    ),
    dict(grafting="rmsprop", momentum="update", refresh="together_from_first"),
  ],
)
def test_eight_devices_update_as_one_does(hyper):
  """After three steps every block has a root."""
  mesh, gradients = (
    make_mesh(config.Mesh(2, 2, 2)),
    jax.tree.map(lambda g: g[0], noise({"w": (3, 12, 8), "gain": (2, 5)}, 1)),
  )
  hyper = dict(
    axes={"w": Axes((0,), (1,), (2,)), "gain": Axes((0,), (), (1,))},
    block_size=8,
    b2=0.95,
    eps=0.1,
    **hyper,
  )
  one, _ = run(jax.tree.map(lambda g: np.broadcast_to(g, (6, *g.shape)), gradients), **hyper)

  shardings = {
    "w": jax.NamedSharding(mesh, jax.P(None, "fsdp", "model")),
    "gain": jax.NamedSharding(mesh, jax.P()),
  }
  gradients, tx = jax.device_put(gradients, shardings), scale_by_shampoo(mesh=mesh, **hyper)
  of_state = optim.Optimizer(tx, None, {}, gradients).state_shardings(shardings)
  init = jax.jit(tx.init, out_shardings=of_state)
  update = jax.jit(
    lambda g, state, limit: scale_by_shampoo(mesh=mesh, max_residual=limit, **hyper).update(
      g, state
    )
  )
  for limit in (0.1, -1.0):
    state = init(gradients)
    for t in range(6):
      updates, state = update(gradients, state, limit)
      if limit > 0 and t >= 3:
        for key, expected in one.items():
          np.testing.assert_allclose(
            updates[key], expected[t], rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=key
          )
    for name, real in {"8x8": 3, "4x8": 3, "5": 2}.items():
      bucket = state.blocks[name]
      for x in jax.tree.leaves(bucket):
        assert (
          x.addressable_shards[0].data.shape == (1, *x.shape[1:])
          and len(x) == 8
          and np.isfinite(x).all()
        )
      kept = np.asarray(bucket.roots.kept)
      assert not kept[real:].any() and (kept[:real] > 0).all() == (limit < 0)
  assert update._cache_size() == 1


@pytest.mark.parametrize(
  "hyper, message",
  [
    (dict(eps_mode="relativ"), "eps_mode = 'relativ': did you mean 'relative'"),
    (dict(grafting="adamw"), "grafting = 'adamw': did you mean 'adam'"),
    (
      dict(graft_granularity="tensor"),
      "graft_granularity = 'tensor': expected one of 'block', 'parameter'",
    ),
    (dict(momentum="updates"), "momentum = 'updates': did you mean 'update'"),
    (dict(root="svd"), "root = 'svd': expected one of 'eigh', 'newton', 'denman_beavers', 'qr'"),
    (dict(refresh="stagger"), "refresh = 'stagger': did you mean 'staggered'"),
    (dict(long_axes="drop"), "long_axes = 'drop': expected one of 'block', 'skip'"),
    (
      dict(preconditioner_dtype="float16"),
      "preconditioner_dtype = 'float16': did you mean 'bfloat16'",
    ),
    (dict(block_size=0), "block_size = 0: expected at least 1"),
    (dict(precondition_frequency=0), "precondition_frequency = 0: expected at least 1"),
    (
      dict(preconditioner_dtype="bfloat16", b2=0.999),
      "b2 = 0.999: averages in bfloat16 stop changing above 0.99",
    ),
    (
      dict(eigenvalue_correction=True, grafting="adam"),
      "grafting = 'adam': eigenvalue_correction works with 'none' only",
    ),
    (
      dict(eigenvalue_correction=True, packed=True),
      "packed = True: eigenvalue_correction works with False only",
    ),
    (dict(exponent=0.0), "exponent = 0.0: expected the positive power"),
    (dict(exponent=-0.5), "exponent = -0.5: expected the positive power"),
    (
      dict(root="newton", exponent=0.3),
      r"root = 'newton', p = 3\.33.*choose eigh or qr, or another exponent",
    ),
  ],
)
def test_what_cannot_be_is_refused_when_built(hyper, message):
  with pytest.raises(ValueError, match=message):
    shampoo(0.1, **hyper)
